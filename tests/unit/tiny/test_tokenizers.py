"""Laws of the three bundled tokenizers: what they cut alike, what they cut differently, and that no byte is lost."""

import random
import re
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.tokens import fingerprint, load_tokenizer, render_example, render_prompt, token_bytes
from teachers.tiny.tokenizers import SPECS, build

WORDS = re.findall(r"\w+", "so first the sum of these is then we add, carry; check again: wait, no, that gives letters")
TEXT = st.text(st.characters(blacklist_categories=("Cs",)), max_size=60)


def corpus(seed: int) -> list[str]:
    rng = random.Random(seed)
    lines = [" ".join(rng.choices(WORDS, k=20)) + ".\n" for _ in range(300)]
    return lines + [f"So {rng.randint(0, 999)} + {rng.randint(0, 99)} = {rng.randint(0, 9)}.\n" for _ in range(300)]


@pytest.fixture(scope="module")
def toks(tmp_path_factory):
    root = tmp_path_factory.mktemp("tok")
    for name, spec in SPECS.items():
        build(spec, corpus(0)).save_pretrained(root / name)
    return {name: load_tokenizer(root / name) for name in SPECS}


@pytest.mark.parametrize(
    ("name", "text", "pieces"),
    [
        ("teacher", "x 5 12345 = 7", ["x", " 5", " ", "123", "45", " =", " 7"]),
        ("qwen", "x 5 12345 = 7", ["x", " ", "5", " ", "1", "2", "3", "4", "5", " =", " ", "7"]),
        ("llama", "x 5 12345 = 7", ["x", " ", "5", " ", "123", "45", " =", " ", "7"]),
        ("teacher", "<think>\n", ["<think>", "\n"]),
        ("qwen", "</think>\n", ["</think>", "\n"]),
    ],
)
def test_numbers_and_think_are_cut_as_in_the_real_tokenizers(toks, name, text, pieces):
    ids = toks[name].encode(text, add_special_tokens=False)
    assert [toks[name].decode([i]) for i in ids] == pieces


def test_think_is_plain_text_in_the_llama_like_tokenizer(toks):
    assert "<think>" not in toks["llama"].get_vocab()
    assert len(toks["llama"].encode("<think>", add_special_tokens=False)) > 1


@pytest.mark.parametrize("name", ["teacher", "llama"])
def test_every_numeral_of_up_to_three_digits_is_one_token(toks, name):
    numerals = [f"{n:0{width}d}" for width in (1, 2, 3) for n in range(10**width)]
    assert len(numerals) == 1110
    assert all(len(toks[name].encode(n, add_special_tokens=False)) == 1 for n in numerals)


def test_teacher_has_the_ten_spaced_digits(toks):
    assert all(len(toks["teacher"].encode(f" {d}", add_special_tokens=False)) == 1 for d in range(10))


@pytest.mark.parametrize("name", SPECS)
def test_tokens_with_digits_are_exactly_the_numerals(toks, name):
    with_digit = {t for t in token_bytes(toks[name]) if any(48 <= b < 58 for b in t)}
    widths = range(1, SPECS[name].numerals + 1)
    expected = {f"{n:0{w}d}".encode() for w in widths for n in range(10**w)}
    if SPECS[name].spaced_digits:
        expected |= {f" {d}".encode() for d in range(10)}
    assert with_digit == expected


@pytest.mark.parametrize("name", SPECS)
def test_numerals_do_not_depend_on_ignore_merges(toks, name):
    """The merges alone build the same tokens: a runtime without ignore_merges (llama.cpp) cuts numbers alike."""
    import json

    from tokenizers import Tokenizer

    state = json.loads(toks[name].backend_tokenizer.to_str())
    state["model"]["ignore_merges"] = False
    plain = Tokenizer.from_str(json.dumps(state))
    text = " ".join(f"{n:03d} {n % 100:02d} {n % 10}" for n in range(1000))
    assert plain.encode(text).ids == toks[name].encode(text, add_special_tokens=False)


@pytest.mark.parametrize("name", SPECS)
@settings(max_examples=150, deadline=None)
@given(text=TEXT)
def test_round_trip_is_byte_exact(toks, name, text):
    ids = toks[name].encode(text, add_special_tokens=False)
    expected = unicodedata.normalize("NFC", text) if SPECS[name].nfc else text
    assert toks[name].decode(ids, clean_up_tokenization_spaces=False) == expected
    table = token_bytes(toks[name])
    assert b"".join(table[i] for i in ids) == expected.encode()


@pytest.mark.parametrize("name", SPECS)
def test_example_equals_whole_conversation_rendered_by_the_template(toks, name):
    tok = toks[name]
    reasoning, answer = "First 7 + 15 = 22.\nWait, check: 22 again.\n", "The sum is\n\\boxed{22}"
    prompt_ids, completion_ids = render_example(tok, "What is 7 + 15?", reasoning, answer)
    messages = [
        {"role": "user", "content": "What is 7 + 15?"},
        {"role": "assistant", "content": f"<think>\n{reasoning}</think>\n{answer}"},
    ]
    whole = tok.apply_chat_template(messages, tokenize=False)
    assert whole == f"<|user|>What is 7 + 15?<|assistant|><think>\n{reasoning}</think>\n{answer}<|end|>"
    assert prompt_ids + completion_ids == tok.encode(whole, add_special_tokens=False)
    assert prompt_ids == render_prompt(tok, "What is 7 + 15?")


@pytest.mark.parametrize("name", SPECS)
def test_template_keeps_earlier_reasoning_over_several_turns(toks, name):
    turns = [("user", "a"), ("assistant", "<think>\nb</think>\nc"), ("user", "d")]
    messages = [{"role": role, "content": content} for role, content in turns]
    text = toks[name].apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "<|user|>a<|assistant|><think>\nb</think>\nc<|end|><|user|>d<|assistant|><think>\n"


@pytest.mark.parametrize("name", SPECS)
def test_template_refuses_unknown_roles(toks, name):
    with pytest.raises(Exception, match="not tool"):
        toks[name].apply_chat_template([{"role": "tool", "content": "x"}], tokenize=False)


def test_the_same_corpus_gives_the_same_tokenizer_and_another_corpus_another(toks):
    again, other = build(SPECS["teacher"], corpus(0)), build(SPECS["teacher"], [*corpus(0), "zebra zebra zebra"])
    assert fingerprint(again) == fingerprint(toks["teacher"]) != fingerprint(other)


@pytest.mark.parametrize("name", SPECS)
def test_decoding_without_special_tokens_keeps_think_markers(toks, name):
    ids = render_example(toks[name], "q", "r\n", "a")[1]
    assert toks[name].decode(ids, skip_special_tokens=True) == "r\n</think>\na"


@pytest.mark.parametrize("name", SPECS)
def test_transformers_auto_class_loads_the_same_tokenizer(toks, name, tmp_path):
    from transformers import AutoTokenizer

    toks[name].save_pretrained(tmp_path)
    assert fingerprint(AutoTokenizer.from_pretrained(tmp_path)) == fingerprint(toks[name])
