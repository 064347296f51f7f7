"""TeacherEngine: from a folder on disk to samples, scores and their provenance."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from sampling_models import as_table, deepseek, qwen3

from distill.errors import ModelError
from distill.generate import Generator
from distill.records import CaptureSpec, SampleRequest, SamplingParams
from distill.slots import SlotModel
from distill.tokens import render_prompt, stop_ids
from teachers.engine import TeacherEngine

torch.set_num_threads(1)
BUNDLED = Path(__file__).parents[3] / "teachers" / "tiny" / "teacher"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
PARAMS = SamplingParams(0.9, 0.95, 0, 12)


def saved(model, folder: Path) -> Path:
    model.save_pretrained(folder)
    for name in TOKENIZER_FILES:
        shutil.copy(BUNDLED / name, folder)
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    vocab = max(json.loads((BUNDLED / "tokenizer.json").read_text())["model"]["vocab"].values()) + 65
    return saved(deepseek(vocab_size=vocab).to(torch.bfloat16), tmp_path_factory.mktemp("teacher"))


@pytest.fixture
def copy(checkpoint, tmp_path):
    shutil.copytree(checkpoint, tmp_path / "copy")
    return tmp_path / "copy"


def asked(engine: TeacherEngine) -> list[SampleRequest]:
    prompts = [tuple(render_prompt(engine.tokenizer, f"What is {i} plus {i}?")) for i in range(5)]
    return [SampleRequest(str(i), j, ids, 100 * i + j) for i, ids in enumerate(prompts) for j in range(3)]


def test_a_saved_teacher_samples_captures_and_scores(checkpoint):
    engine = TeacherEngine(checkpoint, batch_size=4)
    assert engine.model.dtype == torch.float32  # bfloat16 on disk, widened on a CPU
    requests = {(r.key, r.sample_index): r for r in asked(engine)}
    samples = list(engine.sample(requests.values(), PARAMS, CaptureSpec()))
    assert {(s.key, s.sample_index) for s in samples} == requests.keys()
    assert all(max(s.completion_ids) < engine.vocab_size for s in samples)
    pairs = [(requests[s.key, s.sample_index].prompt_ids, s.completion_ids) for s in samples]
    for sample, scored in zip(samples, engine.score(pairs, CaptureSpec()), strict=True):
        assert abs(sample.dists.logsumexp_T - scored.logsumexp_T).max() < 1e-4


def test_vocabulary_ends_where_the_tokenizer_ends(checkpoint):
    engine = TeacherEngine(checkpoint)
    assert engine.vocab_size == max(engine.tokenizer.get_vocab().values()) + 1
    assert engine.vocab_size < engine.model.config.vocab_size
    assert engine.stop_ids == stop_ids(engine.tokenizer)


def test_stop_ids_can_be_given(checkpoint):
    first = TeacherEngine(checkpoint, batch_size=4)
    table = as_table(first.sample(asked(first), PARAMS))
    token = next(ids[2] for ids, _ in table.values() if len(ids) > 3 and ids[2] not in ids[:2])
    second = TeacherEngine(checkpoint, batch_size=4, stop_ids=[token])
    found = [ids for ids, reason in as_table(second.sample(asked(second), PARAMS)).values() if reason == "stop"]
    assert found and all(ids.index(token) == len(ids) - 1 for ids in found)


def test_decode_keeps_markers_and_drops_the_stop_token(checkpoint):
    engine = TeacherEngine(checkpoint)
    ids = engine.tokenizer.encode("1 + 1 = 2</think>\n2", add_special_tokens=False)
    assert engine.decode([*ids, engine.stop_ids[0]]) == engine.decode(ids) == "1 + 1 = 2</think>\n2"


def test_a_dense_teacher_draws_what_its_model_draws(tmp_path):
    model = qwen3()
    model.resize_token_embeddings(3000)
    engine = TeacherEngine(saved(model, tmp_path / "dense"), batch_size=4)
    loop = Generator(SlotModel(model, engine.vocab_size), 7, engine.stop_ids)
    assert as_table(engine.sample(asked(engine), PARAMS)) == as_table(loop.sample(asked(engine), PARAMS))


def test_fingerprint_follows_the_weights(checkpoint, copy):
    assert TeacherEngine(checkpoint).fingerprint == TeacherEngine(copy).fingerprint
    weights = load_file(copy / "model.safetensors")
    weights["model.norm.weight"] *= 1.01
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    assert TeacherEngine(checkpoint).fingerprint != TeacherEngine(copy).fingerprint


def test_close_frees_the_weights(checkpoint):
    import weakref

    engine = TeacherEngine(checkpoint)
    weight = weakref.ref(engine.model.lm_head.weight)
    engine.close()
    assert weight() is None
    with pytest.raises(RuntimeError, match="closed"):
        engine.score([], CaptureSpec())


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_missing_file_is_named_before_weights_are_read(copy, name, monkeypatch):
    (copy / name).unlink()
    monkeypatch.setattr("teachers.engine.load_model", lambda *_: pytest.fail("weights were read"))
    with pytest.raises(ModelError, match=name):
        TeacherEngine(copy)


def test_a_damaged_file_is_named_before_weights_are_read(copy, monkeypatch):
    data = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(data[:-100])
    monkeypatch.setattr("teachers.engine.load_model", lambda *_: pytest.fail("weights were read"))
    with pytest.raises(ModelError, match=r"model\.safetensors"):
        TeacherEngine(copy)


def config_with(folder: Path, **changes) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def test_a_weight_that_is_missing_is_never_made_up(copy):
    weights = load_file(copy / "model.safetensors")
    del weights["model.layers.1.self_attn.kv_b_proj.weight"]
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="kv_b_proj"):
        TeacherEngine(copy)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "no_such_model", "auto_map": {"AutoModelForCausalLM": "x.Y"}}, "no_such_model"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantised"),
        ({"vocab_size": 100}, "tokenizer"),
        ({"hidden_size": 48}, "transformers cannot load"),
    ],
)
def test_configs_that_do_not_fit_are_refused(copy, changes, message):
    config_with(copy, **changes)
    with pytest.raises(ModelError, match=message) as error:
        TeacherEngine(copy)
    assert str(copy) in str(error.value) and error.value.remedy
