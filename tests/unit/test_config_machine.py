"""Laws of check_machine: all that a machine lacks is told at once, before anything is loaded or fetched."""

import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from distill.config import check_machine, load_config
from distill.config_check import is_hub_id, is_loopback
from distill.errors import CapacityError, ConfigError, ModelError, ServiceError

VALID = """
run: {name: t}
prompts:
  train: [{kind: reasoning_gym, families: {chain_sum: 20}}]
  eval: [{kind: reasoning_gym, families: {chain_sum: 5}}]
teacher: {path: org/teacher}
students:
  - {name: a, path: org/base, loss: {kind: logits, alpha: 0.9}}
  - {name: b, path: org/base, loss: {kind: response}}
"""


@pytest.fixture
def valid(tmp_path):
    (tmp_path / "c.yaml").write_text(VALID)
    return str(tmp_path / "c.yaml")


@pytest.fixture
def machine(valid, tmp_path, monkeypatch):
    """check_machine on a checkpoint folder that is whole, in an empty home; returns (folder, check)."""
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"w": np.zeros((2, 2), np.float32)}, str(folder / "model.safetensors"))
    (folder / "config.json").write_text('{"model_type": "qwen3"}')
    (folder / "tokenizer.json").write_text("{}")
    for name in ("WANDB_API_KEY", "HF_TOKEN", "HF_TOKEN_PATH", "HF_HUB_CACHE", "NETRC", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    paths = [f"teacher.path={folder}", f"students.0.path={folder}", f"students.1.path={folder}"]
    return folder, lambda *overrides: check_machine(load_config(valid, [*paths, *overrides]))


def test_a_machine_that_has_everything_passes(machine):
    assert machine[1]() is None


def test_more_gpus_than_the_machine_has_is_a_capacity_error(machine):
    with pytest.raises(CapacityError, match=r"should have 99999 GPU\(s\), but it has \d+\."):
        machine[1]("hardware.device=cuda", "hardware.gpus=99999", "hardware.gpus_per_node=99999")


def test_a_service_on_or_off_this_machine_is_told_by_its_address():
    assert all(map(is_loopback, ["http://localhost:1/v1", "http://127.0.0.5", "http://[::1]:8000"]))
    assert not any(map(is_loopback, ["http://10.0.0.1", "https://localhost.example.org", "http://[2001:db8::1]/"]))


@pytest.mark.parametrize(
    ("override", "variable"),
    [("tracking.wandb=online", "WANDB_API_KEY"), ("publish.repo=o/r", "HF_TOKEN"), (None, "TEACHER_TOKEN")],
)
def test_a_token_that_is_asked_for_must_be_there(machine, monkeypatch, override, variable):
    overrides = [override] if override else ["teacher.url=https://example.org/v1", "teacher.token_env=TEACHER_TOKEN"]
    with pytest.raises(ServiceError, match=variable):
        machine[1](*overrides)
    monkeypatch.setenv(variable, "x")
    assert machine[1](*overrides) is None


def test_stored_logins_count_as_tokens(machine, tmp_path):
    (tmp_path / ".netrc").write_text("machine api.wandb.ai login user password x\n")
    (tmp_path / ".netrc").chmod(0o600)
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "token").write_text("x")
    assert machine[1]("tracking.wandb=online", "publish.repo=o/r") is None


def break_weights(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:-3])


def only_pickles(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (break_weights, "model.safetensors"),
        (only_pickles, "safetensors"),
        (lambda folder: (folder / "config.json").unlink(), "config.json"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer.json"),
    ],
)
def test_a_checkpoint_that_cannot_be_loaded_is_a_model_error_that_is_told_once(machine, damage, said):
    damage(machine[0])
    with pytest.raises(ModelError, match=said) as caught:
        machine[1]()
    assert str(caught.value).count("cannot be loaded") + str(caught.value).count("has no tokenizer") == 1


def test_a_hub_id_may_be_fetched_unless_the_hub_is_switched_off(machine, monkeypatch, tmp_path):
    with pytest.raises(ModelError, match="org/base: no such folder, not in the Hub cache, and HF_HUB_OFFLINE is set"):
        machine[1]("students.0.path=org/base")
    (tmp_path / "hf" / "hub" / "models--org--base" / "snapshots").mkdir(parents=True)
    assert machine[1]("students.0.path=org/base") is None
    monkeypatch.delenv("HF_HUB_OFFLINE")
    assert machine[1]("students.0.path=org/other") is None
    assert is_hub_id("org/base") and not is_hub_id("./base") and not is_hub_id("teachers/tiny/x")


def test_all_that_the_machine_lacks_is_told_at_once(machine):
    many = ["hardware.device=cuda", "hardware.gpus=99999", "hardware.gpus_per_node=99999", "tracking.wandb=online"]
    with pytest.raises(CapacityError) as caught:
        machine[1](*many, "publish.repo=o/r", "teacher.path=no/such/folder", "students.0.path=missing")
    lines = str(caught.value).split("\n  ")
    assert lines[0] == "5 errors in this machine:" and len(lines) == 6
    for line, word in zip(lines[1:], ("GPU", "no/such/folder", "missing", "WANDB_API_KEY", "HF_TOKEN")):
        assert word in line


def test_optimizers_offload_and_adapters_ask_for_what_they_need(machine, monkeypatch, tmp_path):
    _, check = machine
    chosen = ["train.optimizer=adamw8bit", "students.0.adapter={kind: qlora}"]
    assert check(*chosen) is None  # both packages are dependencies
    for package in ("bitsandbytes", "peft"):
        monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    with pytest.raises(CapacityError) as error:
        check(*chosen)
    for said in ("train.optimizer is adamw8bit but bitsandbytes", "kind is qlora but bitsandbytes", "but peft is not"):
        assert said in str(error.value)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(CapacityError) as error:
        check("train.offload=cpu", "hardware.device=cuda")
    assert "there is no g++" in str(error.value) and "there is no ninja" in str(error.value)
    assert check("train.offload=cpu") is None  # on a CPU nothing is compiled


def test_a_model_with_fewer_positions_than_a_completion_is_told_before_any_work(machine, tmp_path):
    folder, check = machine
    asked = ["eval.max_new_tokens=300", "teacher.sampling.max_new_tokens=200"]
    (folder / "config.json").write_text('{"model_type": "qwen3", "max_position_embeddings": 301}')
    check(*asked)
    small = shutil.copytree(folder, tmp_path / "small")
    (small / "config.json").write_text('{"model_type": "qwen3", "max_position_embeddings": 300}')
    said = rf"eval\.max_new_tokens is 300, but students\.1\.path is {small}, which has 300 positions.*max_position"
    with pytest.raises(ConfigError, match=said):
        check(*asked, f"students.1.path={small}")
    with pytest.raises(ConfigError, match=r"teacher\.sampling\.max_new_tokens is 300, but teacher\.path"):
        check("eval.max_new_tokens=200", "teacher.sampling.max_new_tokens=300", f"teacher.path={small}")
    check("eval.max_new_tokens=200", "teacher.url=http://127.0.0.1:1", f"teacher.path={small}")


def test_positions_of_a_model_in_the_hub_cache_are_known_too(machine, monkeypatch, tmp_path):
    hub = tmp_path / "hub"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(hub))
    monkeypatch.setenv("HF_HUB_CACHE", str(hub))
    snapshot = hub / "models--org--short" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (hub / "models--org--short" / "refs").mkdir()
    (hub / "models--org--short" / "refs" / "main").write_text("0" * 40)
    (snapshot / "config.json").write_text('{"max_position_embeddings": 4096}')
    with pytest.raises(ConfigError, match="org/short, which has 4096 positions"):
        machine[1]("students.0.path=org/short", "eval.max_new_tokens=32768")


def test_a_checkpoint_that_may_not_be_read_is_a_model_error(machine):
    folder, check = machine
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to("/proc/self/mem")  # an I/O error for everybody
    with pytest.raises(ModelError, match=r"teacher\.path is .*, which cannot be loaded: .*Input/output error"):
        check()
