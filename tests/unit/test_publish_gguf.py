"""Laws of publishing a GGUF file: asked for, it lies in the folder, checked; what cannot be is said before any work."""

import importlib.util
import json
import shutil
from pathlib import Path

import pytest

from distill import gguf_export
from distill.config import Config, load_config, stage_spec
from distill.errors import ConfigError, ModelError
from distill.model_card import Made
from distill.publish import check_publish, publish_student

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "teachers" / "tiny"
MADE = Made("deepspeed distill/run.py --config c.yaml", "c0ffee", "0123456789abcdef", "feedbead00000000", "abad1dea")
EXTRA = all(importlib.util.find_spec(name) for name in gguf_export.PACKAGES)


def config_of(base, **publish):
    gym = {"kind": "reasoning_gym", "families": {"chain_sum": 8}, "seed": 7}
    return Config.model_validate(
        {
            "run": {"name": "r"},
            "prompts": {"train": [gym], "eval": [gym | {"seed": 900}]},
            "teacher": {"path": str(TINY / "teacher")},
            "students": [{"name": "small", "path": str(TINY / base)}],
            "publish": publish,
        }
    )


def report():
    row = {"name": "teacher", "role": "teacher", "pass_at_1": 0.9, "ci_low": 0.8, "ci_high": 1.0, "mean_tokens": 9.0}
    row |= {"truncated_share": 0.0}
    return {"models": [row, row | {"name": "small", "role": "student"}], "comparisons": [], "gap_recovered": []}


def test_no_gguf_is_written_unless_asked_for(tmp_path):
    config = config_of("student-qwen")
    assert config.publish.gguf is False
    result = publish_student(config, "small", TINY / "student-qwen", tmp_path / "out", report=report(), made=MADE)
    assert result["gguf"] is None and not list((tmp_path / "out").glob("*.gguf"))


@pytest.mark.skipif(not EXTRA, reason="needs the extra gguf")
def test_the_published_folder_holds_a_gguf_file_that_llama_cpp_runs(tmp_path):
    config, out = config_of("student-llama", gguf=True), tmp_path / "out"
    check_publish(config)
    result = publish_student(config, "small", TINY / "student-llama", out, report=report(), made=MADE)
    assert [path.name for path in out.glob("*.gguf")] == ["small-bf16.gguf"]
    assert "small-bf16.gguf" in result["files"] and result["gguf"]["checked"] and result["gguf"]["tokens"] > 4
    assert result["gguf"]["bytes"] == (out / "small-bf16.gguf").stat().st_size


def test_without_the_extra_it_is_a_config_error_before_any_work(monkeypatch):
    monkeypatch.setattr(gguf_export, "PACKAGES", ("json", "a_writer_that_nobody_has"))
    check_publish(config_of("student-qwen"))
    with pytest.raises(ConfigError, match=r"publish\.gguf.*a_writer_that_nobody_has.*\[gguf\]"):
        check_publish(config_of("student-qwen", gguf=True))


def test_a_student_that_llama_cpp_cannot_hold_is_refused_before_any_work():
    """With or without the extra: the question is answered from tokenizer.json."""
    with pytest.raises(ModelError, match="no name for the way this tokenizer cuts text"):
        check_publish(config_of("student-same", gguf=True))
    check_publish(config_of("student-same"))


@pytest.mark.skipif(not EXTRA, reason="needs the extra gguf")
def test_a_trained_student_with_other_tensors_leaves_no_folder_behind(tmp_path):
    model = tmp_path / "model"
    shutil.copytree(TINY / "student-llama", model)
    config = json.loads((model / "config.json").read_text()) | {"num_hidden_layers": 4}
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="tensors missing or unknown"):
        publish_student(
            config_of("student-llama", gguf=True), "small", model, tmp_path / "out", report=report(), made=MADE
        )
    assert not (tmp_path / "out").exists()


def test_gguf_of_no_student_is_a_contradiction():
    with pytest.raises(ConfigError, match=r"publish\.gguf.*publish\.student"):
        load_config(ROOT / "configs" / "demo.yaml", ["publish.student=null", "publish.gguf=true"])


def test_asking_for_gguf_redoes_the_publish_stage_alone():
    plain, asked = config_of("student-qwen"), config_of("student-qwen", gguf=True)
    for stage in ("prompts", "traces", "logits", "eval"):
        assert stage_spec(plain, stage) == stage_spec(asked, stage)
    assert stage_spec(plain, "train", "small") == stage_spec(asked, "train", "small")
    assert stage_spec(plain, "publish") != stage_spec(asked, "publish")
