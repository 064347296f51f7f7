"""Traces on disk: one parquet row a prompt, the columns of OpenR1-Math-220k and ours; which samples are kept and why.

`datasets.load_dataset("parquet", data_files=...)` reads a shard as it is, and the `messages` column is a conversation
that supervised trainers take without conversion. Everything a Trace holds comes back unchanged from read_traces.
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from distill.errors import DataError
from distill.records import SCHEMA_VERSION, Prompt, Trace, Verdict
from distill.store import StageFolder

DROP_REASONS = ("wrong", "truncated", "unparsable", "grader_error", "duplicate", "over_quota")
_REASON_OF = {
    Verdict.WRONG: "wrong",
    Verdict.TRUNCATED: "truncated",
    Verdict.UNPARSABLE: "unparsable",
    Verdict.ERROR: "grader_error",
}
_VERSION_KEY = b"distill.schema"

_TEXT, _FLAGS = pa.string(), pa.list_(pa.bool_())
PROMPT_COLUMNS = {
    "problem": _TEXT,
    "answer": _TEXT,
    "source": _TEXT,
    "uuid": _TEXT,
    "prompt_key": _TEXT,
    "family": _TEXT,
    "level": pa.int64(),
    "grader": _TEXT,
    "metadata_json": _TEXT,
}
SAMPLE_COLUMNS = {  # one entry a sample, sorted by sample_index
    "sample_index": pa.list_(pa.int64()),
    "seed": pa.list_(pa.int64()),
    "completion_ids": pa.list_(pa.list_(pa.int32())),
    "generations": pa.list_(_TEXT),
    "finish_reasons": pa.list_(_TEXT),
    "verdict": pa.list_(_TEXT),
    "keep": _FLAGS,
    "drop_reason": pa.list_(_TEXT),
}
_DERIVED_COLUMNS = {  # for other readers; read_traces does not need them
    "solution": _TEXT,
    "problem_type": _TEXT,
    "question_type": _TEXT,
    "is_reasoning_complete": _FLAGS,
    "correctness_math_verify": _FLAGS,
    "correctness_llama": _FLAGS,
    "correctness_count": pa.int64(),
    "messages": pa.list_(pa.struct({"role": _TEXT, "content": _TEXT})),
}
SCHEMA = pa.schema(
    {**PROMPT_COLUMNS, "prompt_ids": pa.list_(pa.int32()), **SAMPLE_COLUMNS, **_DERIVED_COLUMNS},
    metadata={_VERSION_KEY: str(SCHEMA_VERSION)},
)


def keep_decision(
    verdicts: Sequence[Verdict], texts: Sequence[str], *, verify: bool, max_per_prompt: int | None
) -> list[str]:
    """For each sample of ONE prompt, in the order of sample_index: "" to keep it, else the reason to drop it.

    The verdict decides first: all but correct are dropped. Without `verify` only truncated ones are, since the others
    ended by themselves. Then a text that equals a kept one is a duplicate, and after max_per_prompt kept ones the rest
    is over_quota.
    """
    reasons, kept = [], set()
    for verdict, text in zip(verdicts, texts, strict=True):
        judged = verify or verdict == Verdict.TRUNCATED
        reason = _REASON_OF.get(verdict, "") if judged else ""
        if not reason and text in kept:
            reason = "duplicate"
        if not reason and max_per_prompt is not None and len(kept) >= max_per_prompt:
            reason = "over_quota"
        if not reason:
            kept.add(text)
        reasons.append(reason)
    return reasons


def decide(traces: Sequence[Trace], verify: bool, max_per_prompt: int | None) -> list[Trace]:
    """The same traces in the same order, with keep and drop_reason set prompt by prompt; see keep_decision."""
    groups: dict[str, list[Trace]] = {}
    for trace in sorted(traces, key=lambda trace: trace.sample_index):
        groups.setdefault(trace.prompt.key, []).append(trace)
    reasons: dict[str, str] = {}
    for group in groups.values():
        verdicts, texts = [trace.verdict for trace in group], [trace.text for trace in group]
        decisions = keep_decision(verdicts, texts, verify=verify, max_per_prompt=max_per_prompt)
        reasons |= {trace.sample_key: reason for trace, reason in zip(group, decisions, strict=True)}
    return [replace(t, keep=not reasons[t.sample_key], drop_reason=reasons[t.sample_key]) for t in traces]


def rejection_counts(traces: Iterable[Trace]) -> dict[str, int]:
    """How many traces were dropped for each reason; every reason is listed, with 0 where none was."""
    counts = Counter(trace.drop_reason for trace in traces if not trace.keep)
    return {reason: counts.pop(reason, 0) for reason in DROP_REASONS} | dict(counts)


def write_traces(path: Path, traces: Iterable[Trace]) -> None:
    """Writes one row a prompt, in the order in which prompts first appear; the same traces always give the same bytes.

    DataError if a sample comes twice, if samples of one key disagree on the prompt, or if keep contradicts drop_reason.
    """
    groups: dict[str, list[Trace]] = {}
    for trace in traces:
        groups.setdefault(trace.prompt.key, []).append(trace)
    rows = [_row(sorted(group, key=lambda trace: trace.sample_index)) for group in groups.values()]
    write_rows(path, rows, SCHEMA)


def read_traces(path: Path) -> list[Trace]:
    """Every sample of a shard, in the order it was written; DataError if the file is damaged or is not a trace set."""
    rows = read_rows(path, ["prompt_ids", *PROMPT_COLUMNS, *SAMPLE_COLUMNS])
    return [trace for number, row in enumerate(rows) for trace in _traces_of(row, f"{path} row {number}")]


def iter_traces(stage: StageFolder) -> Iterator[Trace]:
    """The traces of all shards of a stage in the order of the shards' names, each shard checked before it is read."""
    for shard in stage.shards():
        if shard.name.endswith(".parquet"):
            yield from read_traces(stage.check_shard(shard.name).path)


def prompt_row(prompt: Prompt) -> dict:
    """The columns PROMPT_COLUMNS of one prompt."""
    row = asdict(prompt)
    row["problem"], row["metadata_json"] = row.pop("text"), json.dumps(row.pop("metadata"), ensure_ascii=False)
    return row | {"uuid": prompt.key, "prompt_key": prompt.key}


def prompt_of_row(row: dict, where: str) -> Prompt:
    """The prompt of a row; DataError if its text is no longer the one that its key was made of."""
    plain = {name: row[name] for name in ("answer", "family", "level", "grader", "source")}
    prompt = Prompt(text=row["problem"], metadata=json.loads(row["metadata_json"]), **plain)
    if prompt.key != row["prompt_key"]:
        what = f"the problem's key is {prompt.key} but prompt_key says {row['prompt_key']}: the text was changed"
        raise DataError(what, where=where, remedy=_again(where))
    return prompt


def write_rows(path: Path, rows: list[dict], schema: pa.Schema) -> None:
    """Writes rows as parquet with a checksum per page: without them a flipped bit reads as another text."""
    table = pa.Table.from_pylist(rows, schema)
    pq.write_table(table, path, compression="zstd", write_page_checksum=True)


def read_rows(path: Path, columns: Sequence[str]) -> list[dict]:
    """The rows of a parquet file written by distill; DataError for a damaged file, missing columns, another version."""
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            schema = file.schema_arrow
            missing = [name for name in columns if name not in schema.names]
            version = (schema.metadata or {}).get(_VERSION_KEY, str(SCHEMA_VERSION).encode()).decode()
            rows = [] if missing else file.read(columns=list(columns)).to_pylist()
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DataError(f"cannot be read as parquet: {error}", where=str(path), remedy=_again(path)) from error
    if missing:
        raise DataError(f"lacks the columns {', '.join(missing)}", where=str(path), remedy=_again(path))
    if version != str(SCHEMA_VERSION):
        what = f"has schema version {version}; this program reads {SCHEMA_VERSION}"
        raise DataError(what, where=str(path), remedy="Make the stage again with --restart, or use the older program.")
    return rows


def _again(path: Path | str) -> str:
    return f"Delete {str(path).split(' row ')[0]} and run its stage again: only this shard is made again."


def _row(group: list[Trace]) -> dict:
    first = group[0]
    _check_group(group)
    correct = [trace.verdict == Verdict.CORRECT for trace in group]
    metadata = first.prompt.metadata
    return {
        **prompt_row(first.prompt),
        "prompt_ids": first.prompt_ids,
        "sample_index": [trace.sample_index for trace in group],
        "seed": [trace.seed for trace in group],
        "completion_ids": [trace.completion_ids for trace in group],
        "generations": [trace.text for trace in group],
        "finish_reasons": [trace.finish_reason for trace in group],
        "verdict": [trace.verdict.value for trace in group],
        "keep": [trace.keep for trace in group],
        "drop_reason": [trace.drop_reason for trace in group],
        "solution": metadata.get("solution"),
        "problem_type": first.prompt.family,
        "question_type": metadata.get("question_type", first.prompt.grader),
        "is_reasoning_complete": [trace.finish_reason == "stop" and "</think>" in trace.text for trace in group],
        "correctness_math_verify": correct,
        "correctness_llama": None,
        "correctness_count": sum(correct),
        "messages": _messages(group),
    }


def _messages(group: list[Trace]) -> list[dict] | None:
    """The prompt and the first kept completion; None when none is kept."""
    text = next((trace.text for trace in group if trace.keep), None)
    if text is None:
        return None
    # A chat template that opens the reasoning itself leaves the tag in the prompt; a reader of messages needs it here.
    if "</think>" in text and "<think>" not in text.partition("</think>")[0]:
        text = "<think>\n" + text
    return [{"role": "user", "content": group[0].prompt.text}, {"role": "assistant", "content": text}]


def _check_group(group: list[Trace]) -> None:
    first = group[0]
    for before, trace in zip([None, *group], group, strict=False):
        where = f"trace {trace.sample_key}"
        if before and before.sample_index == trace.sample_index:
            remedy = "Give every sample of a prompt its own index."
            raise DataError("the sample comes twice", where=where, remedy=remedy)
        if trace.prompt != first.prompt or trace.prompt_ids != first.prompt_ids:
            remedy = "Drop duplicate prompts (same Prompt.key) before sampling."
            raise DataError("two different prompts share this key", where=where, remedy=remedy)
        if trace.keep == bool(trace.drop_reason):
            remedy = "A kept trace has no drop_reason, a dropped one has."
            raise DataError(f"keep is {trace.keep}", where=where, value=trace.drop_reason, remedy=remedy)


def _traces_of(row: dict, where: str) -> Iterator[Trace]:
    try:
        prompt = prompt_of_row(row, where)
        samples = [row[name] for name in SAMPLE_COLUMNS]
        for index, seed, ids, text, finish, verdict, keep, reason in zip(*samples, strict=True):
            yield Trace(prompt, index, seed, row["prompt_ids"], ids, text, finish, Verdict(verdict), keep, reason)
    except (TypeError, ValueError) as error:
        raise DataError(f"is not a row of a trace set: {error}", where=where, remedy=_again(where)) from error
