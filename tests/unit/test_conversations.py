"""Conversations from files: which turns are read, and why others are not."""

import json
from collections import Counter

import pytest
from align_world import byte_level

from distill.config_mixture import GeneralJsonl
from distill.conversations import REJECTED, Readable, Row, read_turns, rows_of
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


BAD = ["text", [{"role": "user"}], ["a"], None, [{"role": 1, "content": "a"}], [{"role": "", "content": "a"}]]


@pytest.mark.parametrize("bad", BAD, ids=str)
def test_a_row_that_is_no_conversation_is_named(tmp_path, bad):
    with pytest.raises(DataError, match="is no conversation") as caught:
        read_turns(write(tmp_path / "c.jsonl", said("a", "b"), bad), Counter())
    assert "line 2" in str(caught.value)


def test_a_file_without_any_answer_is_refused(tmp_path):
    with pytest.raises(DataError, match="no conversation of 1 holds an answer"):
        read_turns(write(tmp_path / "c.jsonl", said("a")), Counter())


def test_half_a_character_is_counted_and_stops_nothing(tmp_path):
    counts = Counter()
    role = [{"role": "\ud800", "content": "q"}, *said("q", "a")]
    source = write(tmp_path / "c.jsonl", said("q \ud800", "a"), said("q", "a \udfff"), said("q", "a"), role)
    assert len(read_turns(source, counts)) == 1 and counts["not_round_trip"] == 3
    with pytest.raises(DataError, match=r"line 1: holds half a character"):
        list(rows_of(source))


def test_a_tool_call_is_no_text_so_turns_with_and_after_it_are_counted(tmp_path):
    counts, called = Counter(), said("q", "a", "hm", "I look it up", "and", "3")
    called[3]["tool_calls"] = [{"function": {"name": "f"}}]
    called[1]["tool_calls"] = None  # as tables have it where nothing is called
    rows = read_turns(write(tmp_path / "c.jsonl", called), counts)
    assert [row.answer for row in rows] == ["</think>\na"] and counts["refused"] == 2


def test_json_that_nests_too_deeply_is_named(tmp_path):
    (tmp_path / "c.jsonl").write_text("[" * 200_000)
    with pytest.raises(DataError, match=r"line 1: is not JSON"):
        read_turns(GeneralJsonl(path=str(tmp_path / "c.jsonl")), Counter())


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


@pytest.mark.parametrize("role", ["user<|end|>", "human"], ids=["forges a turn", "is left out by the template"])
def test_roles_that_would_change_what_is_read_are_refused(role):
    tokenizer = byte_level([])
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role != 'human' %}{{ m.role }}: {{ m.content }}<|end|>{% endif %}{% endfor %}"
    )
    readable = Readable(tokenizer, 1000)
    assert readable.ids(Row((("system", "s"), ("user", "q"), ("assistant", "a")))) != "refused"
    assert readable.ids(Row(((role, "who asks"), ("user", "q"), ("assistant", "a")))) == "refused"
