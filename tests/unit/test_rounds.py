"""What a student says in a round: which prompts it is asked, and which of its answers are read."""

import pytest
from align_world import byte_fallback, byte_level

from distill.align_bytes import ByteTokenizer
from distill.config import load_config
from distill.errors import ConfigError, DataError
from distill.plan import plan
from distill.records import Prompt, Sample
from distill.rounds import _join, askable, choose, conversation
from distill.store import RunFolder
from distill.tokens import encode_completion, end_id, stop_ids, token_bytes

PROMPTS = [Prompt(f"q {i}", "1", "f") for i in range(20)]


def test_every_round_asks_others_and_the_same_for_a_seed():
    first, second = (choose(PROMPTS, 8, 3, number) for number in (1, 2))
    assert len({p.key for p in first}) == 8 and first == choose(list(reversed(PROMPTS)), 8, 3, 1)
    assert {p.key for p in first} != {p.key for p in second} and first != choose(PROMPTS, 8, 4, 1)
    assert sorted(p.key for p in choose(PROMPTS, None, 3, 1)) == sorted(p.key for p in PROMPTS)


def test_a_prompt_with_a_special_token_of_the_student_is_not_asked_and_stops_nothing():
    tokenizer = byte_level([(b"a", b"b")])
    forged = Prompt(f"what is {tokenizer.decode([end_id(tokenizer)])}?", "1", "f")
    found = askable([PROMPTS[0], forged, PROMPTS[1]], tokenizer)
    assert [prompt for prompt, _ in found] == PROMPTS[:2] and all(ids for _, ids in found)


def said(text: str, finish: str = "stop", more: tuple = ()):
    tokenizer = byte_level([(b"a", b"b")])
    ids = [*encode_completion(tokenizer, text), *more, *([end_id(tokenizer)] if finish == "stop" else [])]
    return read_back(tokenizer, ids, finish)


def read_back(tokenizer, ids: list[int], finish: str = "stop"):
    sample = Sample(PROMPTS[0].key, 1, 0, ids, finish)
    return conversation(PROMPTS[0], sample, token_bytes(tokenizer), stop_ids(tokenizer))


def test_an_answer_is_read_as_the_very_text_that_was_written():
    found = said("ab, hm\n</think>\nyes")
    assert found == [
        {"role": "user", "content": "q 0"},
        {"role": "assistant", "content": "<think>\nab, hm\n</think>\nyes"},
    ]


@pytest.mark.parametrize(
    ("text", "finish", "reason"),
    [
        ("ab</think>\ny", "length", "truncated"),
        ("ab, and no end of it", "stop", "unclosed"),
        ("ab</think>y", "stop", "unclosed"),  # it would be read with a line break
    ],
)
def test_what_is_not_whole_is_left_out(text, finish, reason):
    assert said(text, finish) == reason


KINDS = {
    "byte level": lambda: byte_level([(b"\xe2", b"\x82")]),
    "byte fallback": lambda: byte_fallback(["\u2581", *"a.</think>\n", "\u2581a"], []),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", ["\u20ac a", " a\u20ac", "\ufffd", "\U0001f600 \u00e9"])
def test_a_character_of_several_tokens_is_read_whole_and_half_of_one_not_at_all(kind, text):
    """Also at both ends of the text, and where the student did write U+FFFD, which stands for half a character."""
    tokenizer = KINDS[kind]()
    table = ByteTokenizer(tokenizer)
    ids = [table.id_of_bytes[bytes([b])] for b in text.encode()]
    rest = [*encode_completion(tokenizer, "</think>\n."), end_id(tokenizer)]
    assert read_back(tokenizer, ids + rest)[1]["content"] == f"<think>\n{text}</think>\n."
    wide = [at for at, b in enumerate(text.encode()) if b >= 0x80]
    for gone in wide:
        assert read_back(tokenizer, ids[:gone] + ids[gone + 1 :] + rest) == "not_utf8"
    assert read_back(tokenizer, [*rest[:-1], ids[wide[0]], rest[-1]]) == "not_utf8"


def test_a_round_in_which_nothing_can_be_read_says_what_to_do(tmp_path):
    stage = RunFolder(tmp_path, "run", commit="test").stage("train", "s").open({}, {})
    stage.write_shard("said-00000.jsonl", lambda path: path.write_text(""), {"said": 3, "truncated": 3})
    with pytest.raises(DataError, match=r"nothing that the student says.*teacher\.sampling\.max_new_tokens"):
        _join(stage, tmp_path / "said.jsonl")
    stage.write_shard("said-00001.jsonl", lambda path: path.write_text("x\n"), {"said": 2, "truncated": 1})
    assert _join(stage, tmp_path / "said.jsonl") == {"said": 5, "truncated": 4}
    assert (tmp_path / "said.jsonl").read_text() == "x\n"
    stage.run.release()


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["train.on_policy={rounds: 0}"], "train.on_policy.rounds"),
        (["train.on_policy={share: 1}"], "train.on_policy.share"),
        (["train.on_policy={share: 1e-300}"], "it must be >= 0.01"),  # so many traces that no memory holds them
        (["train.on_policy={}", "students=[{name: a, path: x, loss: {kind: response}}]"], "which it trains"),
        (
            ["train.on_policy={}", "teacher.capture=null", "students=[{name: a, path: x, loss: {kind: response}}]"],
            "capture is null",
        ),
    ],
)
def test_rounds_that_cannot_be_are_refused_before_any_work(overrides, told):
    with pytest.raises(ConfigError, match=told):
        load_config("configs/demo.yaml", overrides)


def test_the_plan_says_that_texts_and_rounds_come_on_top():
    text = "train.text_sets=[{name: people, source: {kind: jsonl, path: people.jsonl}}]"
    found = plan(load_config("configs/qwen32b.yaml", [text, "train.on_policy={rounds: 2, prompts: 500}"])).notes
    assert any(note.startswith("train.text_sets: the teacher reads them once") for note in found)
    assert any(note.startswith("train.on_policy: 2 rounds of 500 prompts") for note in found)
    assert not any("text_sets" in note or "on_policy" in note for note in plan(load_config("configs/demo.yaml")).notes)


def test_the_plan_has_room_on_disk_for_what_every_round_keeps():
    without, one, two = (
        plan(load_config("configs/qwen32b.yaml", more)).disk["4-student"]
        for more in ([], ["train.on_policy={rounds: 1}"], ["train.on_policy={rounds: 2}"])
    )
    assert two - one == one - without > without / 2  # which has room for a checkpoint that is being written, once
