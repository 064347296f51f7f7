"""The prompts stage: sources -> 1-prompts/train.parquet and eval.parquet, without repeats and without contamination.

Training and evaluation are kept apart by content, never by seed: a training prompt whose key, or whose text up to case,
spacing and sentence punctuation, is in the evaluation set is dropped and counted. Nothing is dropped uncounted.
"""

import importlib.metadata
import json
import math
import re
import time
import unicodedata
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from decimal import Decimal
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa

from distill import files, tokens
from distill.errors import DataError
from distill.grade import grade
from distill.records import SCHEMA_VERSION, Prompt, Verdict
from distill.store import StageFolder
from distill.traceset import PROMPT_COLUMNS, prompt_of_row, prompt_row, read_rows, write_rows

_SCHEMA = pa.schema(PROMPT_COLUMNS, metadata={b"distill.schema": str(SCHEMA_VERSION)})
SURROGATE = re.compile("[\ud800-\udfff]")
_LOADERS = {".parquet": "parquet", ".json": "json", ".jsonl": "json", ".csv": "csv"}
COUNTED = ("read", "kept", "duplicate", "overlapping", "other_split", "special", "over_max", "short")


def make_prompts(config: Any, stage: StageFolder, special: Collection[str] = ()) -> dict:
    """Writes the opened stage from config.prompts and finishes it; returns its counts. Rank 0 only.

    special: texts that no prompt may hold (special_of). Counts: {"train": n, "eval": n, "sources": [{"split", "source",
    read, kept, duplicate, overlapping, other_split, special, over_max, short}]}. `read` is the sum of the next six of
    these; `short` is how many prompts a generator could not find. DataError if a file cannot be used, or if training or
    evaluation ends up empty.
    """
    started_s = time.monotonic()
    evaluation, train, sources = collect(config.prompts, special)
    _write_prompts(stage, "train", train)
    _write_prompts(stage, "eval", evaluation)
    counts = {"train": len(train), "eval": len(evaluation), "sources": sources}
    generated = any(source.kind == "reasoning_gym" for source in [*config.prompts.train, *config.prompts.eval])
    made_by = {"reasoning_gym": importlib.metadata.version("reasoning_gym")} if generated else {}
    return stage.finish(counts, wall_s=time.monotonic() - started_s, **made_by)["counts"]


def load_prompts(stage: StageFolder, which: str) -> list[Prompt]:
    """The prompts of a finished stage, `which` is "train" or "eval"; StoreError or DataError if they cannot be read."""
    path = stage.check_shard(f"{which}.parquet").path
    rows = read_rows(path, list(PROMPT_COLUMNS))
    return [prompt_of_row(row, f"{path} row {number}") for number, row in enumerate(rows)]


def special_of(paths: Iterable[str]) -> set[str]:
    """The special tokens of the tokenizers of these models. In a prompt one would end or forge a turn, and no model
    could be asked it: left out here, it stops no later stage after hours of work. ModelError or DataError for a
    tokenizer that cannot be used: no file, no chat template, or one that takes no question."""
    found: set[str] = set()
    for tok in map(tokens.load_tokenizer, sorted(set(paths))):
        tokens.end_id(tok)
        tokens.render_prompt(tok, "What is 17 + 25?")
        found.update(tokens.special_tokens(tok))
    return found


def collect(config: Any, special: Collection[str] = ()) -> tuple[list[Prompt], list[Prompt], list[dict]]:
    """(evaluation prompts, training prompts, counts per source) of a `prompts` section; see make_prompts."""
    no_overlap = _Overlap([])
    evaluation, eval_counts = _gather(config.eval, "heldout", no_overlap, special)
    train, train_counts = _gather(config.train, "train", _Overlap(evaluation), special)
    counts = [*_labelled("eval", eval_counts), *_labelled("train", train_counts)]
    _require_both(evaluation, train, train_counts)
    if config.max_train is not None and len(train) > config.max_train:
        train = _thin_out(train, config.max_train, counts)
    return [prompt for _, prompt in evaluation], [prompt for _, prompt in train], counts


def normalised(text: str) -> str:
    """The text up to case, spacing and sentence punctuation: two prompts with the same one ask the same question.

    Signs that carry a value stay: operators, brackets, decimal points, commas between numbers, a minus before a digit.
    So "3 - 4" and "3 + 4" differ, while "What is 3+4 ?" and "what is 3 + 4" do not.
    """
    text = unicodedata.normalize("NFKC", text.translate(_SIGNS)).casefold()
    text = re.sub(r"(?<=\d)\s*,\s*(?=[-+]?\d)", "\0", text)  # a comma between numbers separates them
    text = re.sub(r"\.(?!\d)|[,;:?\"'`$]|(?<![\d)])(?<!\b\w)!", " ", text)  # 5!, n! and (n+1)! are factorials
    text = re.sub(r"\s*([-+*/^=<>()\[\]{}|%!\0])\s*", r"\1", text)
    text = re.sub(r"(?<=[^\W\d]{2})-(?=[^\W\d]{2})", " ", text)  # well-known; but x-y
    return " ".join(text.replace("\0", ",").split())


_SIGNS = str.maketrans(
    {"×": "*", "·": "*", "÷": "/", "−": "-", "–": "-", "—": "-", "“": '"', "”": '"', "‘": "'", "’": "'"}
    | {sign: f"^{digit}" for digit, sign in enumerate("⁰¹²³⁴⁵⁶⁷⁸⁹")}
)


class _Overlap:
    """Whether a prompt is, or nearly is, one of a set."""

    def __init__(self, prompts: Sequence[tuple[int, Prompt]]):
        self.keys = {prompt.key for _, prompt in prompts}
        self.texts = {normalised(prompt.text) for _, prompt in prompts}

    def __contains__(self, prompt: Prompt) -> bool:
        return prompt.key in self.keys or (bool(self.texts) and normalised(prompt.text) in self.texts)


def _gather(
    sources: Sequence[Any], side: str, excluded: _Overlap, special: Collection[str]
) -> tuple[list[tuple[int, Prompt]], list[dict]]:
    """[(position of its source, prompt)] without repeats, `excluded` and what holds a text of `special`, and the counts
    of each source."""
    kept, seen, counts = [], set(), []
    for position, source in enumerate(sources):
        count = Counter(dict.fromkeys(COUNTED, 0))
        for candidates, wanted in _batches(source, side):
            found = 0
            for prompt in candidates:
                if wanted is not None and found == wanted:
                    break
                fate = _fate(prompt, source, side, seen, excluded, special)
                count["read"] += 1
                count[fate] += 1
                if fate == "kept":
                    found += 1
                    seen.add(prompt.key)
                    kept.append((position, prompt))
            count["short"] += 0 if wanted is None else wanted - found
        counts.append({"source": _name(source), **count})
    return kept, counts


def _fate(prompt: Prompt, source: Any, side: str, seen: set[str], excluded: _Overlap, special: Collection[str]) -> str:
    from distill.tasks.split import split_of

    if any(token in prompt.text for token in special):
        return "special"
    if source.kind == "reasoning_gym" and split_of(prompt) != side:
        return "other_split"
    if prompt in excluded:
        return "overlapping"
    return "duplicate" if prompt.key in seen else "kept"


def _batches(source: Any, side: str) -> Iterator[tuple[Iterable[Prompt], int | None]]:
    """(candidates, how many of them are wanted; None for all) of one source."""
    if source.kind == "reasoning_gym":
        for family, count in _families(source).items():
            levels = len(source.levels)
            for position, level in enumerate(source.levels):
                wanted = count // levels + (position < count % levels)
                yield _generate(family, level, source.seed, wanted), wanted
    else:
        rows = source_rows(source, [source.prompt_field, source.answer_field])
        yield (_prompt(source, row, where) for where, row in rows), None


def source_rows(source: Any, columns: list[str]) -> Iterator[tuple[str, dict]]:
    """(where it stands, the row) of each row of a jsonl or hf source, up to its limit; of a dataset these columns."""
    rows = _jsonl_rows(source) if source.kind == "jsonl" else _hf_rows(source, columns)
    return islice(rows, getattr(source, "limit", None))


def _families(source: Any) -> dict[str, int]:
    return source.families if isinstance(source.families, dict) else dict.fromkeys(source.families, source.per_family)


def _generate(family: str, level: int, seed: int, wanted: int) -> Iterator[Prompt]:
    """Problems of index 0, 1, ... The bound ends the search in a family that has fewer problems than are wanted:
    one in ten is held out, so evaluation alone needs ten times as many candidates, and repeats come on top."""
    from distill.tasks.families import make_problem

    for index in range(40 * wanted + 1000):
        prompt = make_problem(family, level, seed, index)
        if prompt is not None:
            yield prompt


def _jsonl_rows(source: Any) -> Iterator[tuple[str, dict]]:
    with Path(source.path).open("rb") as lines:
        for number, line in enumerate(lines, 1):
            where = f"{source.path} line {number}"
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DataError(f"is not JSON: {error}", where=where, remedy="Write one JSON object a line.") from error
            if not isinstance(row, dict):
                raise DataError("is not a JSON object", where=where, remedy="Write one JSON object a line.")
            yield where, row


def _hf_rows(source: Any, columns: list[str]) -> Iterator[tuple[str, dict]]:
    table = _hf_table(source)
    if missing := [name for name in columns if name not in table.column_names]:
        what = f"has no column {', '.join(missing)}; it has {', '.join(table.column_names)}"
        raise DataError(what, where=f"{source.path} split {source.split}", remedy="Name its columns in the source.")
    for number, row in enumerate(table.select_columns(columns)):
        yield f"{source.path} split {source.split} row {number}", row


def _hf_table(source: Any) -> Any:
    import datasets  # slow to import, and most runs need none

    path = Path(source.path)
    subset = getattr(source, "subset", None)
    try:
        if path.is_file():
            return datasets.load_dataset(
                _LOADERS[path.suffix], data_files={source.split: str(path)}, split=source.split
            )
        if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            return _saved(path, source.split)
        return datasets.load_dataset(source.path, subset, split=source.split)
    except DataError:
        raise
    except Exception as error:  # the library raises over a dozen classes here, most of them ValueError
        remedy = "Check path, subset and split; a Hub dataset needs the network unless it is in the local cache."
        what = f"the dataset cannot be loaded: {type(error).__name__}: {error}"
        raise DataError(what, where=f"{source.path} split {source.split}", remedy=remedy) from error


def _saved(path: Path, split: str) -> Any:
    """What save_to_disk wrote: one split of several, or a data set that has none and goes by the name train."""
    import datasets

    found = datasets.load_from_disk(str(path))
    splits = found if isinstance(found, dict) else {"train": found, str(found.split): found}
    if split not in splits:
        there = ", ".join(name for name in splits if name != "None")
        raise DataError(f"has no split {split}; it has {there}", where=str(path), remedy="Name one of them in split.")
    return splits[split]


def _prompt(source: Any, row: dict, where: str) -> Prompt:
    text = _field(row, source.prompt_field, "prompt_field", where)
    answer = _field(row, source.answer_field, "answer_field", where)
    family = getattr(source, "family", None) or Path(source.path).stem
    prompt = Prompt(text=text, answer=answer, family=family, grader=source.grader, source=str(source.path))
    if prompt.grader in ("integer", "number"):  # cheap; math starts processes
        graded = grade(prompt, f"</think>\\boxed{{{answer}}}", "stop")
        if graded.verdict != Verdict.CORRECT:
            remedy = f"Correct {source.answer_field}, remove the row, or set grader: math or exact."
            raise DataError(f"the answer is not a plain {prompt.grader}", where=where, value=answer[:80], remedy=remedy)
    return prompt


def _field(row: dict, name: str, setting: str, where: str) -> str:
    value = row.get(name)
    if isinstance(value, int | float) and not isinstance(value, bool):
        if not math.isfinite(value):
            raise DataError(f"{name!r} is no finite number", where=where, value=value, remedy="Correct or remove it.")
        value = format(Decimal(str(value)), "f")  # 1e-07 is 0.0000001: graders read no exponents
    if isinstance(value, str) and SURROGATE.search(value):
        raise DataError(f"{name!r} holds half a character", where=where, remedy="Remove the escape \\uD800 to \\uDFFF.")
    if isinstance(value, str) and value.strip():
        return value.strip()
    if name not in row:
        what = f"there is no field {name!r}; the fields are {', '.join(row) or 'none'}"
        raise DataError(what, where=where, remedy=f"Add it, or name the right field in {setting}.")
    what = f"the field {name!r} is blank" if value in (None, "") or isinstance(value, str) else f"{name!r} is not text"
    raise DataError(what, where=where, value=value, remedy=f"Fill it in, remove the row, or name another {setting}.")


def _require_both(evaluation: Sequence, train: Sequence, counts: list[dict]) -> None:
    if not evaluation:
        remedy = "Add a source, or raise the number of prompts: about one generated problem in ten is held out."
        raise DataError("the evaluation set is empty", where="prompts.eval", remedy=remedy)
    if train:
        return
    overlapping, read = sum(c["overlapping"] for c in counts), sum(c["read"] for c in counts)
    if overlapping:
        what = f"all {overlapping} training prompts that were read are also in the evaluation set"
        raise DataError(what, where="prompts.train", remedy="Train on other prompts than those you evaluate on.")
    special = sum(c["special"] for c in counts)
    held = f", of them {special} with a special token of a tokenizer" if special else ""
    what = f"the training set is empty ({read} read{held})"
    raise DataError(what, where="prompts.train", remedy="Add a source with rows.")


def _thin_out(train: list[tuple[int, Prompt]], limit: int, counts: list[dict]) -> list[tuple[int, Prompt]]:
    """`limit` prompts, chosen evenly over all sources by the hash of their text; the others are counted as over_max."""
    chosen = {prompt.key for _, prompt in sorted(train, key=lambda item: item[1].key)[:limit]}
    of_train = [count for count in counts if count["split"] == "train"]
    for position, prompt in train:
        if prompt.key not in chosen:
            of_train[position]["kept"] -= 1
            of_train[position]["over_max"] += 1
    return [item for item in train if item[1].key in chosen]


def _labelled(split: str, counts: list[dict]) -> list[dict]:
    return [{"split": split, **count} for count in counts]


def _name(source: Any) -> str:
    return "reasoning_gym" if source.kind == "reasoning_gym" else str(source.path)


def _write_prompts(stage: StageFolder, which: str, prompts: Sequence[Prompt]) -> None:
    rows = [prompt_row(prompt) for prompt in prompts]
    stage.write_shard(
        f"{which}.parquet", lambda path: write_rows(path, rows, _SCHEMA), {"prompts": len(rows)}, wall_s=0.0
    )


def source_hashes(prompts: Any) -> dict[str, str]:
    """Path -> hash of every local file or folder among the sources: the stage's inputs, so that an edit is noticed.

    DataError if one is not there. Generated and Hub prompts are fixed by the config alone.
    """
    return file_hashes([*prompts.train, *prompts.eval])


def _hash(local: Path) -> str:
    if local.is_file():
        return files.file_sha256(local)
    inside = sorted(entry for entry in local.rglob("*") if entry.is_file())
    return files.digest([[str(entry.relative_to(local)), files.file_sha256(entry)] for entry in inside])


def file_hashes(sources: Sequence[Any]) -> dict[str, str]:
    """source_hashes of a list of sources."""
    hashes, lines = {}, {str(source.path) for source in sources if source.kind == "jsonl"}
    for path in sorted({str(source.path) for source in sources if source.kind in ("jsonl", "hf")}):
        local = Path(path)
        if local.is_file() or (local.is_dir() and path not in lines):
            try:
                hashes[path] = _hash(local)
            except OSError as error:
                what = f"cannot be read: {error.strerror}"
                raise DataError(
                    what, where=path, remedy="Give this user the right to read it, or check the disk."
                ) from error
        elif path in lines or local.suffix in _LOADERS or path.startswith((".", "/", "~")):
            what = "there is no such file" if path in lines else "there is no such file or folder"
            raise DataError(what, where=path, remedy="Correct the path of this source.")
    return hashes
