"""Which numbers of devices may share a row: told before any work, of sizes in the config and in the checkpoint."""

import json

import pytest

from distill.config import load_config
from distill.config_sequence import misfit_for_sequence
from distill.errors import ConfigError

TEXT = """
run: {{name: t}}
hardware: {{gpus: 8}}
prompts:
  train: [{{kind: jsonl, path: a.jsonl}}]
  eval: [{{kind: jsonl, path: b.jsonl}}]
teacher: {{path: org/teacher}}
students:
  - name: a
    path: {path}
    loss: {{kind: response}}
train: {{sequence_parallel: {size}}}
"""
SIZES = {"family": "llama", "hidden_size": 8, "layers": 1, "intermediate_size": 8, "vocab_size": 9}


def config_of(tmp_path, size: int, *overrides: str):
    path = tmp_path / "c.yaml"
    path.write_text(TEXT.format(path=tmp_path, size=size))
    return load_config(path, overrides)


@pytest.mark.parametrize(
    "size, heads, fits", [(1, 7, True), (2, 28, True), (4, 28, True), (8, 28, False), (8, 32, True)]
)
def test_the_devices_of_a_row_divide_the_attention_heads(tmp_path, size, heads, fits):
    (tmp_path / "config.json").write_text(json.dumps({"num_attention_heads": heads}))
    found = list(misfit_for_sequence(config_of(tmp_path, size)))
    assert [str(error) for error in found] == [
        f"train.sequence_parallel is {size}; it must divide the {heads} attention heads of student a. "
        "Use a divisor of both, or 1."
    ] * (not fits)
    geometry = f"students.0.geometry={json.dumps(SIZES | {'heads': heads, 'head_dim': 2})}"
    if fits:
        config_of(tmp_path, size, geometry)
    else:
        with pytest.raises(ConfigError, match=f"is {size}; it must divide the {heads} attention heads of student a"):
            config_of(tmp_path, size, geometry)


@pytest.mark.parametrize("content", [None, "[]", "{", "{}"])
def test_a_checkpoint_that_says_nothing_is_left_to_others(tmp_path, content):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    assert list(misfit_for_sequence(config_of(tmp_path, 2))) == []
