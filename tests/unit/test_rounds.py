"""What a student says in a round: which prompts it is asked, and which of its answers are read."""

import pytest
from align_world import byte_level

from distill.config import load_config
from distill.errors import ConfigError, DataError
from distill.plan import plan
from distill.records import Prompt, Sample
from distill.rounds import _join, askable, choose, conversation
from distill.store import RunFolder
from distill.tokens import encode_completion, end_id, stop_ids

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
    sample = Sample(PROMPTS[0].key, 1, 0, ids, finish)
    return conversation(PROMPTS[0], sample, tokenizer, stop_ids(tokenizer))


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
    without, with_rounds = (
        plan(load_config("configs/qwen32b.yaml", more)).disk["4-student"]
        for more in ([], ["train.on_policy={rounds: 2}"])
    )
    assert with_rounds == 3 * without > 0
