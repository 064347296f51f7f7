"""What a config and a machine must give to the training of students."""

import pytest

from distill.config import load_config
from distill.config_optimizer import missing_for_optimizer
from distill.errors import CapacityError, ConfigError

CONFIG = """
run: {name: t}
prompts:
  train: [{kind: reasoning_gym, families: {chain_sum: 20}}]
  eval: [{kind: reasoning_gym, families: {chain_sum: 5}}]
teacher: {path: org/teacher, sampling: {max_new_tokens: 4096}}
students: [{name: a, path: org/base}]
"""


@pytest.fixture
def path(tmp_path):
    (tmp_path / "c.yaml").write_text(CONFIG)
    return str(tmp_path / "c.yaml")


def test_traces_may_be_longer_than_rows_where_the_config_says_what_becomes_of_them(path):
    with pytest.raises(ConfigError, match=r"must be < train\.max_seq_tokens, 4096.*train\.too_long"):
        load_config(path)
    for fate in ("drop", "split"):
        assert load_config(path, [f"train.too_long={fate}"]).train.too_long == fate


def test_pages_that_cuda_moves_need_a_gpu_and_a_machine_without_one_says_so(path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    ways = ["train.too_long=drop", "train.optimizer=paged_adamw8bit"]
    with pytest.raises(ConfigError, match="only CUDA moves pages"):
        load_config(path, [*ways, "hardware.device=cpu"])
    (error,) = missing_for_optimizer(load_config(path, ways))
    assert isinstance(error, CapacityError) and "no GPU here" in str(error) and "adamw8bit" in str(error)
    assert not list(missing_for_optimizer(load_config(path, [*ways, "train.optimizer=adamw8bit"])))
