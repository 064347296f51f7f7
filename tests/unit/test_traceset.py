"""Laws of the trace set: what goes in comes out, others can read it, and each dropped sample has one counted reason."""

import dataclasses
import os
import random
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.errors import DataError, StoreError
from distill.records import Prompt, Trace, Verdict
from distill.store import RunFolder
from distill.traceset import (
    DROP_REASONS,
    decide,
    iter_traces,
    keep_decision,
    read_traces,
    rejection_counts,
    write_traces,
)

OPENR1_COLUMNS = """problem solution answer problem_type question_type source uuid is_reasoning_complete generations
correctness_math_verify correctness_llama finish_reasons correctness_count messages"""
OUR_COLUMNS = """prompt_key family level grader metadata_json prompt_ids completion_ids sample_index seed verdict keep
drop_reason"""
NINE = Prompt("What is 4 + 5?", "9", "chain_sum", 1, "integer", "reasoning_gym/chain_sum", {"seed": 7, "index": 3})
WORD = Prompt("Spell backward: naïve\n", "evïan", "spell_backward", 2, "exact", "x.jsonl", {"solution": "e v ï a n"})


def trace(
    prompt: Prompt, index: int, text: str, verdict: Verdict = Verdict.CORRECT, reason: str = "", **other
) -> Trace:
    fields = {
        "seed": 2**63 - 1 - index,
        "prompt_ids": [1, 2, len(prompt.text)],
        "completion_ids": [*text.encode(), 151_935],
        "finish_reason": "stop",
    }
    return Trace(prompt, index, text=text, verdict=verdict, keep=not reason, drop_reason=reason, **fields | other)


TRACES = [
    trace(WORD, 0, "e v ï a n</think>\nevïan", Verdict.WRONG, "wrong"),
    trace(NINE, 1, "4 + 5 = 8</think>\n8", Verdict.WRONG, "wrong"),
    trace(NINE, 0, "", Verdict.TRUNCATED, "truncated", finish_reason="length", completion_ids=[]),
    trace(NINE, 3, "4 + 5 = 9</think>\n9"),
    trace(NINE, 7, "count: 9</think>\n\\boxed{9}"),
]


@pytest.fixture
def shard(tmp_path) -> Path:
    write_traces(tmp_path / "a.parquet", TRACES)
    return tmp_path / "a.parquet"


def test_every_trace_comes_back_equal_grouped_by_prompt_and_sorted_by_index(shard):
    assert read_traces(shard) == [TRACES[0], TRACES[2], TRACES[1], TRACES[3], TRACES[4]]


_TEXT = st.text(st.characters(codec="utf-8"), max_size=30)
_JSON = st.dictionaries(_TEXT, st.none() | st.booleans() | st.integers(-(2**53), 2**53) | _TEXT, max_size=3)


@settings(deadline=None, max_examples=50)
@given(
    text=_TEXT,
    metadata=_JSON,
    samples=st.lists(
        st.tuples(_TEXT, st.lists(st.integers(0, 2**31 - 1), max_size=4), st.sampled_from(Verdict), st.booleans()),
        min_size=1,
        max_size=4,
    ),
)
def test_any_text_any_ids_and_any_metadata_come_back_equal(tmp_path_factory, text, metadata, samples):
    prompt = Prompt(text, "answer", "family", 3, "exact", "source", metadata)
    traces = [
        trace(prompt, index, completion, verdict, "" if keep else "duplicate", completion_ids=ids)
        for index, (completion, ids, verdict, keep) in enumerate(samples)
    ]
    path = tmp_path_factory.mktemp("any") / "a.parquet"
    write_traces(path, traces)
    assert read_traces(path) == traces


def test_the_same_traces_give_the_same_bytes(shard, tmp_path):
    write_traces(tmp_path / "b.parquet", list(TRACES))
    assert (tmp_path / "b.parquet").read_bytes() == shard.read_bytes()


def test_the_columns_are_openr1_and_ours(shard):
    schema = pq.read_schema(shard)
    assert sorted(schema.names) == sorted(f"{OPENR1_COLUMNS} {OUR_COLUMNS}".split())
    assert pq.ParquetFile(shard).metadata.row_group(0).column(0).compression == "ZSTD"


def test_datasets_reads_a_shard_and_its_messages(shard, tmp_path):
    table = datasets.load_dataset("parquet", data_files=str(shard), split="train", cache_dir=str(tmp_path / "cache"))
    word, nine = table
    assert nine["problem"] == "What is 4 + 5?" and nine["answer"] == "9" and nine["uuid"] == nine["prompt_key"]
    assert nine["uuid"] == NINE.key and nine["problem_type"] == "chain_sum" and nine["solution"] is None
    assert nine["generations"] == ["", "4 + 5 = 8</think>\n8", "4 + 5 = 9</think>\n9", "count: 9</think>\n\\boxed{9}"]
    assert nine["correctness_math_verify"] == [False, False, True, True] and nine["correctness_count"] == 2
    assert nine["correctness_llama"] is None and nine["is_reasoning_complete"] == [False, True, True, True]
    assert nine["finish_reasons"] == ["length", "stop", "stop", "stop"] and nine["sample_index"] == [0, 1, 3, 7]
    assert nine["drop_reason"] == ["truncated", "wrong", "", ""] and nine["keep"] == [False, False, True, True]
    # The first kept one; the template had opened the reasoning in the prompt, a reader of messages needs the tag.
    assert nine["messages"] == [
        {"role": "user", "content": "What is 4 + 5?"},
        {"role": "assistant", "content": "<think>\n4 + 5 = 9</think>\n9"},
    ]
    assert word["messages"] is None and word["solution"] == "e v ï a n"


def test_messages_keep_a_tag_that_is_already_there(tmp_path):
    text = "<think>\n4 + 5 = 9</think>\n9"
    write_traces(tmp_path / "a.parquet", [trace(NINE, 0, text)])
    assert pq.read_table(tmp_path / "a.parquet")["messages"][0].as_py()[1]["content"] == text


def test_an_empty_shard_is_read_as_no_traces(tmp_path):
    write_traces(tmp_path / "a.parquet", [])
    assert read_traces(tmp_path / "a.parquet") == []


def test_a_damaged_or_foreign_file_is_an_error_that_names_it(shard, tmp_path):
    good = shard.read_bytes()
    for bad in (b"", b"text", good[: len(good) // 2], good[:-1]):
        shard.write_bytes(bad)
        with pytest.raises(DataError, match=f"{shard}: cannot be read as parquet.*Delete {shard}"):
            read_traces(shard)
    with pytest.raises(DataError, match=r"none\.parquet"):
        read_traces(tmp_path / "none.parquet")
    shard.write_bytes(good)
    pq.write_table(pq.read_table(shard).drop(["verdict", "seed"]), shard)
    with pytest.raises(DataError, match="lacks the columns seed, verdict"):
        read_traces(shard)


def test_a_file_of_another_schema_version_is_refused(shard):
    table = pq.read_table(shard)
    pq.write_table(table.replace_schema_metadata({b"distill.schema": b"99"}), shard)
    with pytest.raises(DataError, match="has schema version 99"):
        read_traces(shard)


def rewritten(shard: Path, column: str, values: list) -> None:
    table = pq.read_table(shard)
    index = table.schema.get_field_index(column)
    field = table.schema.field(index)
    pq.write_table(table.set_column(index, field, pa.array(values, field.type)), shard)


def test_an_edited_row_is_an_error_that_names_the_row(shard):
    rewritten(shard, "problem", [WORD.text, "What is 4 + 6?"])
    with pytest.raises(DataError, match=r"row 1: the problem's key is .* the text was changed"):
        read_traces(shard)


@pytest.mark.parametrize(
    ("column", "values"),
    [
        ("verdict", [["wrong"], ["correct"]]),  # fewer entries than samples
        ("verdict", [["wrong"], ["fine"] * 4]),
        ("metadata_json", ["{}", "{"]),
        ("generations", [["x"], None]),
    ],
)
def test_a_row_that_does_not_fit_together_is_an_error_that_names_the_row(shard, column, values):
    rewritten(shard, column, values)
    with pytest.raises(DataError, match="row 1: is not a row of a trace set"):
        read_traces(shard)


def test_contradictions_are_refused_when_writing(tmp_path):
    path = tmp_path / "a.parquet"
    with pytest.raises(DataError, match=f"{NINE.key}/3: the sample comes twice"):
        write_traces(path, [TRACES[3], TRACES[3]])
    respaced = dataclasses.replace(NINE, text="What is  4 + 5?")  # the same key
    for other in (trace(respaced, 4, "x"), trace(NINE, 4, "x", prompt_ids=[9])):
        with pytest.raises(DataError, match="two different prompts share this key"):
            write_traces(path, [TRACES[3], other])
    for keep, reason in ((True, "wrong"), (False, "")):
        with pytest.raises(DataError, match=f"keep is {keep}"):
            write_traces(path, [dataclasses.replace(TRACES[3], keep=keep, drop_reason=reason)])


def test_a_stage_is_read_shard_by_shard_and_a_damaged_shard_stops_it(tmp_path):
    with RunFolder(tmp_path, "demo", commit="c") as run:
        stage = run.stage("traces").open({}, {})
        stage.write_shard("b.parquet", lambda path: write_traces(path, TRACES[1:]), {})
        stage.write_shard("a.parquet", lambda path: write_traces(path, TRACES[:1]), {})
        stage.write_json("counts.json", {})
        assert [t.sample_key for t in iter_traces(stage)] == [
            f"{WORD.key}/0",
            *(f"{NINE.key}/{i}" for i in (0, 1, 3, 7)),
        ]
        os.truncate(stage.path / "b.parquet", 100)
        with pytest.raises(StoreError, match=r"b\.parquet: the shard is damaged"):
            list(iter_traces(stage))


def test_a_bit_flipped_in_the_data_is_noticed_by_the_page_checksums(shard):
    """Those cover pages, not their short headers nor the footer; the sidecar covers every byte, and comes first."""
    good, traces, rng = shard.read_bytes(), read_traces(shard), random.Random(7)
    footer_bytes = int.from_bytes(good[-8:-4], "little") + 8
    noticed, other = 0, 0
    for _ in range(500):
        bad = bytearray(good)
        bad[rng.randrange(len(bad) - footer_bytes)] ^= 1 << rng.randrange(8)
        shard.write_bytes(bad)
        try:
            other += read_traces(shard) != traces
        except DataError:
            noticed += 1
    assert noticed > 100 and other <= 5


C, W, T, U, E = Verdict.CORRECT, Verdict.WRONG, Verdict.TRUNCATED, Verdict.UNPARSABLE, Verdict.ERROR


@pytest.mark.parametrize(
    ("verdicts", "texts", "verify", "quota", "expected"),
    [
        ([C, W, T, U, E], "abcde", True, None, ["", "wrong", "truncated", "unparsable", "grader_error"]),
        ([C, W, T, U, E], "abcde", False, None, ["", "", "truncated", "", ""]),
        ([C, C, C, C], "aaba", True, None, ["", "duplicate", "", "duplicate"]),
        ([W, C, C], "aaa", True, None, ["wrong", "", "duplicate"]),  # equal to a dropped one: not a duplicate
        ([C, C, C, C, W], "aabcd", True, 2, ["", "duplicate", "", "over_quota", "wrong"]),
        ([T, W, C], "abc", False, 1, ["truncated", "", "over_quota"]),
        ([C, C], "ab", True, 1, ["", "over_quota"]),
        ([], "", True, 1, []),
    ],
)
def test_each_sample_is_kept_or_dropped_for_the_first_reason_that_holds(verdicts, texts, verify, quota, expected):
    assert keep_decision(verdicts, list(texts), verify=verify, max_per_prompt=quota) == expected


@given(
    samples=st.lists(st.tuples(st.sampled_from(Verdict), st.sampled_from("abc")), max_size=12),
    verify=st.booleans(),
    quota=st.none() | st.integers(1, 3),
)
def test_kept_samples_are_different_within_the_quota_never_truncated_and_correct_when_verified(samples, verify, quota):
    verdicts, texts = [v for v, _ in samples], [t for _, t in samples]
    reasons = keep_decision(verdicts, texts, verify=verify, max_per_prompt=quota)
    kept = [sample for sample, reason in zip(samples, reasons, strict=True) if not reason]
    assert len(kept) == len({text for _, text in kept}) <= (quota or 12)
    assert all(v == C if verify else v != T for v, _ in kept)
    eligible = {text for v, text in samples if (v == C if verify else v != T)}
    assert len(kept) == min(len(eligible), quota or 12), "nothing is dropped without need"
    assert set(reasons) <= {"", *DROP_REASONS}


def test_traces_are_decided_prompt_by_prompt_in_the_order_of_their_index():
    drawn = [
        trace(NINE, 2, "a", C, "undecided"),
        trace(WORD, 0, "a", C, "undecided"),
        trace(NINE, 0, "b", C, "undecided"),
        trace(NINE, 1, "a", C, "undecided"),
        trace(NINE, 3, "c", W),
    ]
    decided = decide(drawn, True, 2)
    assert [t.drop_reason for t in decided] == ["duplicate", "", "", "", "wrong"]
    assert [t.keep for t in decided] == [False, True, True, True, False]
    assert [t.sample_key for t in decided] == [t.sample_key for t in drawn]
    # In index order NINE's are b, a, a, c: only b is kept, so the second a repeats no kept one.
    assert [t.drop_reason for t in decide(drawn, False, 1)] == ["over_quota", "", "", "over_quota", "over_quota"]


def test_rejections_are_counted_by_reason_with_zeros_for_the_others():
    assert rejection_counts(TRACES) == {
        "wrong": 2,
        "truncated": 1,
        "unparsable": 0,
        "grader_error": 0,
        "duplicate": 0,
        "over_quota": 0,
    }
    assert rejection_counts([trace(NINE, 0, "x", C, "too_long")])["too_long"] == 1
