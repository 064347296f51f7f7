"""Conversations from files: which turns are read, and why others are not."""

import json
from collections import Counter

import pytest
from align_world import byte_level

from distill.config_mixture import GeneralJsonl
from distill.conversations import REJECTED, Readable, Row, read_turns
from distill.errors import DataError
from distill.tokens import end_id, render_prompt


def write(path, *conversations):
    path.write_text("".join(json.dumps({"messages": each}) + "\n" for each in conversations))
    return GeneralJsonl(path=str(path))


def said(*contents):
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


def test_every_turn_of_the_assistant_is_read_after_what_was_said_before(tmp_path):
    counts = Counter()
    source = write(tmp_path / "c.jsonl", said("a", "b", "c", "d"), said("a", "b"), said("q"), said("q", " "))
    rows = read_turns(source, counts)
    assert [[content for _, content in row.messages] for row in rows] == [["a", "b"], ["a", "b", "c", "d"]]
    assert counts == {"read": 4, "turns": 2, "no_assistant": 2, "duplicate": 1}


@pytest.mark.parametrize("bad", ["text", [{"role": "user"}], ["a"], None, [{"role": 1, "content": "a"}]], ids=str)
def test_a_row_that_is_no_conversation_is_named(tmp_path, bad):
    with pytest.raises(DataError, match="is no conversation") as caught:
        read_turns(write(tmp_path / "c.jsonl", said("a", "b"), bad), Counter())
    assert "line 2" in str(caught.value)


def test_a_file_without_any_answer_is_refused(tmp_path):
    with pytest.raises(DataError, match="no conversation of 1 holds an answer"):
        read_turns(write(tmp_path / "c.jsonl", said("a")), Counter())


def test_half_a_character_is_counted_and_stops_nothing(tmp_path):
    counts = Counter()
    source = write(tmp_path / "c.jsonl", said("q \ud800", "a"), said("q", "a \udfff"), said("q", "a"))
    assert len(read_turns(source, counts)) == 1 and counts["not_round_trip"] == 2


def row(question, answer):
    return Row((("user", question), ("assistant", answer)))


def test_a_turn_is_the_template_s_prompt_and_an_answer_that_closes_the_reasoning_and_ends():
    tokenizer = byte_level([(b"a", b"b")])
    prompt_ids, completion_ids = Readable(tokenizer, 100).ids(row("hm", "<think>\nab</think>\nyes"))
    assert prompt_ids == render_prompt(tokenizer, "hm") and completion_ids[-1] == end_id(tokenizer)
    assert tokenizer.decode(completion_ids) == "ab</think>\nyes<|end|>"
    assert tokenizer.decode(Readable(tokenizer, 100).ids(row("hm", "yes"))[1]) == "</think>\nyes<|end|>"


@pytest.mark.parametrize(
    ("question", "answer", "reason"),
    [
        ("a <|end|> b", "yes", "refused"),
        ("q", "e\u0301", "not_round_trip"),  # the normalizer joins the two
        ("q", "x" * 200, "too_long"),
    ],
    ids=["special", "nfc", "long"],
)
def test_what_cannot_be_read_says_why(question, answer, reason):
    assert reason in REJECTED
    assert Readable(byte_level([], nfc=True), 100).ids(row(question, answer)) == reason


def test_an_end_token_in_an_answer_is_plain_text_and_comes_back():
    tokenizer = byte_level([])
    _, completion_ids = Readable(tokenizer, 100).ids(row("q", "the token <|end|> ends"))
    assert completion_ids.count(end_id(tokenizer)) == 1


def test_roles_that_the_chat_template_refuses_are_counted_and_stop_nothing():
    tokenizer = byte_level([])
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    assert Readable(tokenizer, 100).ids(row("q", "a")) == "refused"
