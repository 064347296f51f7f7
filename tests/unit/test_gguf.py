"""Laws of the GGUF file: llama.cpp itself, run on it, cuts the same text and writes the same tokens as transformers."""

import json
import random
import shutil
import unicodedata
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

pytest.importorskip("gguf")
pytest.importorskip("xllamacpp")

from gguf import GGUFReader

from distill import gguf_export
from distill.errors import ModelError
from distill.gguf_check import TEXTS, ask_llama_cpp, check_gguf
from distill.gguf_export import export_gguf
from distill.gguf_model import pre_tokenizer, rope_factors
from distill.tokens import end_id, load_tokenizer, render_prompt, stop_ids

BUNDLED = Path(__file__).resolve().parents[2] / "teachers" / "tiny"
STUDENTS = ("student-qwen", "student-llama")
LETTERS = (
    "aeinorstlTHEANS 0123456789 '.,;:!?()[]{}\\/_-+=*^%$#@<>|\t\n\r\u00a0\u2003"
    "éüñłßøçÅ жниос αβγ 漢字かな한글 ١٢ ½²Ⅳ🙂→∑"
)
WORDS = (
    "so ",
    " the",
    "\n\n",
    "</",
    "think>",
    "'ll",
    "'S ",
    "1000",
    " 25",
    "\\boxed{",
    "  ",
    " \n",
    "answer",
    "<|end|>",
)


@pytest.fixture(scope="module", params=STUDENTS)
def exact(request, tmp_path_factory):
    """(the bundled student's folder, its float32 GGUF file)"""
    folder = BUNDLED / request.param
    out = tmp_path_factory.mktemp(request.param) / "model.gguf"
    export_gguf(folder, out, name=request.param, weights="f32")
    return folder, out


def float32(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()


@torch.inference_mode()
def greedy(model, ids, new_tokens, stops):
    """(ids, their nats in float64) that the model writes when the most likely token is taken each time; no cache."""
    written, nats = [], []
    while len(written) < new_tokens:
        logits_V = model(torch.tensor([ids + written])).logits[0, -1].double()
        token = int(logits_V.argmax())
        nats.append(logits_V.log_softmax(-1)[token].item())
        written.append(token)
        if token in stops:
            break
    return written, nats


def random_text(rng, pieces=60):
    text = "".join(rng.choice(WORDS) if rng.random() < 0.3 else rng.choice(LETTERS) for _ in range(pieces))
    return unicodedata.normalize("NFC", text)


def test_llama_cpp_writes_greedily_what_transformers_writes(exact):
    folder, out = exact
    rng, model, tok = random.Random(), float32(folder), load_tokenizer(folder)
    asked = [f"What is {rng.randint(2, 99)} {rng.choice('+-*')} {rng.randint(2, 99)}?" for _ in range(6)]
    prompts = [render_prompt(tok, text) for text in asked]
    prompts += [[rng.randrange(len(tok) - 8) for _ in range(rng.randint(1, 40))] for _ in range(3)]
    answers = ask_llama_cpp(out, tok, [], "q", prompts, 24)
    for prompt, written, nats, stopped in zip(prompts, answers.written, answers.logprobs, answers.stopped):
        expected, expected_nats = greedy(model, prompt, 24, stop_ids(tok))
        ended = expected[-1] in stop_ids(tok)
        assert (written, stopped) == (expected, ended), (prompt, written, expected)
        known = ~np.isnan(nats)  # llama.cpp tells nothing of a token that ends inside a character
        assert np.allclose(np.array(nats)[known], np.array(expected_nats)[known], atol=1e-4) and known.mean() > 0.5


def test_llama_cpp_cuts_random_text_as_the_tokenizer_does(exact):
    folder, out = exact
    rng, tok = random.Random(), load_tokenizer(folder)
    texts = [random_text(rng) for _ in range(150)]
    found = ask_llama_cpp(out, tok, texts, "q", [[1]], 1).ids
    for text, ids in zip(texts, found):
        assert ids == tok.encode(text, add_special_tokens=False), repr(text)


@pytest.mark.parametrize("weights", ["f16", "bf16"])
@pytest.mark.parametrize("name", STUDENTS)
def test_half_precision_files_pass_the_check(name, weights, tmp_path):
    export_gguf(BUNDLED / name, tmp_path / "m.gguf", name=name, weights=weights)
    checked = check_gguf(tmp_path / "m.gguf", BUNDLED / name, weights=weights)
    assert checked["texts"] == len(TEXTS) and checked["tokens"] >= 5


@pytest.mark.parametrize("name", STUDENTS)
def test_by_default_every_weight_keeps_its_bits_and_llama_rows_are_paired(name, tmp_path):
    """Row i of a head and row i + D/2 turn together in transformers; in llama.cpp's llama rows 2i and 2i + 1 do."""
    written = export_gguf(BUNDLED / name, tmp_path / "m.gguf", name=name)
    stored = load_file(BUNDLED / name / "model.safetensors")
    assert written["weights"] == "bf16" and written["tensors"] == len(stored)
    found = {tensor.name: tensor for tensor in GGUFReader(tmp_path / "m.gguf").tensors}
    paired = [row + half * 24 for row in range(24) for half in (0, 1)]  # of a head of 48 rows
    for theirs, ours in (("q", "attn_q"), ("k", "attn_k"), ("v", "attn_v")):
        expected = stored[f"model.layers.3.self_attn.{theirs}_proj.weight"]
        if name == "student-llama" and theirs != "v":
            expected = torch.cat([head[paired] for head in expected.split(48)])
        bits = found[f"blk.3.{ours}.weight"].data.view(np.int16).reshape(expected.shape)
        assert np.array_equal(bits, expected.view(torch.int16).numpy()), ours
    assert np.array_equal(found["output_norm.weight"].data, stored["model.norm.weight"].float().numpy())


def random_student(folder, kind, tokenizer, rows, **more):
    """A model of random weights, large enough to make distributions that are not flat."""
    config, model = {"qwen2": (Qwen2Config, Qwen2ForCausalLM), "llama": (LlamaConfig, LlamaForCausalLM)}[kind]
    sizes = dict(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=512, initializer_range=0.3, vocab_size=rows, tie_word_embeddings=False,
    )  # fmt: skip
    made = model(config(**(sizes | more)))
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    made.save_pretrained(folder)
    for path in (BUNDLED / tokenizer).glob("*token*"):
        shutil.copyfile(path, folder / path.name)
    shutil.copyfile(BUNDLED / tokenizer / "chat_template.jinja", folder / "chat_template.jinja")
    return folder


def test_qwen2_with_biases_its_own_head_and_padded_rows(tmp_path):
    folder = random_student(tmp_path / "q", "qwen2", "student-qwen", rows=600)
    export_gguf(folder, tmp_path / "m.gguf", name="q")
    assert check_gguf(tmp_path / "m.gguf", folder, weights="f32")["largest_difference_nats"] < 1e-3


STRETCHED = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip


def test_long_context_positions_of_llama_and_the_check_misses_them_when_they_are_left_out(tmp_path, monkeypatch):
    folder = random_student(tmp_path / "l", "llama", "student-llama", rows=1792, rope_parameters=STRETCHED)
    export_gguf(folder, tmp_path / "m.gguf", name="l")
    assert check_gguf(tmp_path / "m.gguf", folder, weights="f32")["largest_difference_nats"] < 1e-3
    whole = gguf_export.read_shape
    monkeypatch.setattr(gguf_export, "read_shape", lambda folder: replace(whole(folder), rope_factors=None))
    export_gguf(folder, tmp_path / "w.gguf", name="l")
    with pytest.raises(ModelError, match="other probabilities"):
        check_gguf(tmp_path / "w.gguf", folder, weights="f32")


def test_position_divisors_by_hand():
    """A head of 4 at theta 100 has frequencies 1 and 0.1: 16 / 2 pi = 2.55 and 0.255 turns over 16 positions."""
    found = rope_factors(STRETCHED | {"rope_theta": 100.0}, 4)
    kept = (16 / (2 * np.pi) - 1) / 3
    assert np.allclose(found, [1 / (kept + (1 - kept) / 8), 8.0])


def test_the_check_finds_rows_that_were_not_paired(tmp_path, monkeypatch):
    monkeypatch.setattr(gguf_export, "_reordered", lambda tensor, name, shape: tensor)
    export_gguf(BUNDLED / "student-llama", tmp_path / "m.gguf", name="l", weights="f32")
    with pytest.raises(ModelError, match="other probabilities"):
        check_gguf(tmp_path / "m.gguf", BUNDLED / "student-llama", weights="f32")


def test_the_check_finds_a_wrong_name_for_the_way_text_is_cut(tmp_path, monkeypatch):
    monkeypatch.setattr(gguf_export, "pre_tokenizer", lambda tok, where: "qwen2")
    export_gguf(BUNDLED / "student-llama", tmp_path / "m.gguf", name="l")
    with pytest.raises(ModelError, match="cuts this text otherwise"):
        check_gguf(tmp_path / "m.gguf", BUNDLED / "student-llama", weights="bf16")


def test_a_file_that_llama_cpp_does_not_load_is_an_error_not_the_end(tmp_path, exact):
    folder, out = exact
    (tmp_path / "cut.gguf").write_bytes(out.read_bytes()[:200_000])
    with pytest.raises(ModelError, match="cannot run this file"):
        check_gguf(tmp_path / "cut.gguf", folder, weights="f32")


def edited(source, target, change):
    """A copy of a bundled student with `change` applied to its config, tokenizer and weights."""
    shutil.copytree(source, target)
    config, tokenizer = (json.loads((target / name).read_text()) for name in ("config.json", "tokenizer.json"))
    weights = load_file(target / "model.safetensors")
    change(config, tokenizer, weights)
    (target / "config.json").write_text(json.dumps(config))
    (target / "tokenizer.json").write_text(json.dumps(tokenizer))
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    return target


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda c, t, w: w.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(192)}), "unknown to it"),
        (lambda c, t, w: w.pop("model.layers.1.mlp.up_proj.weight"), "missing"),
        (lambda c, t, w: w["model.embed_tokens.weight"].view(-1)[7:8].fill_(1e5), "float16"),
        (lambda c, t, w: c["rope_parameters"].update(rope_type="yarn", factor=4.0), "rotary"),
        (lambda c, t, w: c.update(hidden_act="gelu"), "silu"),
        (lambda c, t, w: c.update(architectures=["DeepseekV3ForCausalLM"]), "architecture"),
        (lambda c, t, w: c.update(use_sliding_window=True), "sliding"),
        (lambda c, t, w: t.update(normalizer={"type": "Lowercase"}), "normalizer"),
        (lambda c, t, w: t["added_tokens"][-1].update(lstrip=True), "strip"),
        (lambda c, t, w: t["pre_tokenizer"]["pretokenizers"][1].update(add_prefix_space=True), "no name"),
        (lambda c, t, w: t["pre_tokenizer"]["pretokenizers"][0].update(behavior="Removed"), "no name"),
        (lambda c, t, w: t["model"]["merges"].pop(), "cuts this piece"),
    ],
)  # fmt: skip
def test_what_llama_cpp_would_compute_otherwise_is_refused(change, what, tmp_path):
    folder = edited(BUNDLED / "student-qwen", tmp_path / "s", change)
    with pytest.raises(ModelError, match=what):
        export_gguf(folder, tmp_path / "m.gguf", name="s", weights="f16")


def test_a_tokenizer_whose_cutting_has_no_name_is_refused():
    with pytest.raises(ModelError, match="no name for the way"):
        pre_tokenizer(load_tokenizer(BUNDLED / "student-same"), "student-same")


def test_the_names_of_the_bundled_tokenizers_and_what_ends_a_turn(exact):
    folder, out = exact
    tok, fields = load_tokenizer(folder), GGUFReader(out).fields
    assert fields["tokenizer.ggml.pre"].contents() == {"student-qwen": "qwen2"}.get(folder.name, "llama-bpe")
    assert fields["tokenizer.ggml.eot_token_id"].contents() == end_id(tok)
    assert fields["tokenizer.chat_template"].contents() == tok.chat_template
    assert fields["tokenizer.ggml.add_bos_token"].contents() is False
