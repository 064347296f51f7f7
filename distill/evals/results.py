"""What a model did on a set of prompts, read back from its shards: all that statistics and the report are made of.

Legend: P problems, K samples of each.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from distill.checkpoints import fingerprint_checkpoint, resolve_checkpoint
from distill.errors import StoreError
from distill.records import Prompt, Verdict
from distill.store import Shard, StageFolder
from distill.traceset import PROMPT_COLUMNS, prompt_of_row, read_rows

if TYPE_CHECKING:
    from distill.config import Student

SAMPLE_COLUMNS = {  # one entry a sample, by sample_index; names as in the trace set where it has them
    "seed": pa.list_(pa.int64()),
    "completion_ids": pa.list_(pa.list_(pa.int32())),
    "generations": pa.list_(pa.string()),
    "finish_reasons": pa.list_(pa.string()),
    "verdict": pa.list_(pa.string()),
    "extracted": pa.list_(pa.string()),
    "detail": pa.list_(pa.string()),
}
SCHEMA = pa.schema({**PROMPT_COLUMNS, "prompt_ids": pa.list_(pa.int32()), **SAMPLE_COLUMNS})


@dataclass(frozen=True)
class Candidate:
    """A model that is evaluated. role: teacher, base or student; base: the model a student started from; loss: how it
    was trained (response, logits); fingerprint: of its weights, so that shards of other weights are never mixed in."""

    name: str
    role: str
    base: str = ""
    loss: str = ""
    fingerprint: str = ""


@dataclass
class EvalResult:
    """Everything one model did on one set of prompts, in the prompts' order. Rows are as in the shards."""

    candidate: Candidate
    rows: list[dict] = field(repr=False)

    @cached_property
    def prompts(self) -> list[Prompt]:
        return [prompt_of_row(row, f"evaluation of {self.candidate.name}") for row in self.rows]

    @cached_property
    def verdict_PK(self) -> np.ndarray:
        """Verdict values as text [P, K]."""
        return np.array([row["verdict"] for row in self.rows])

    @cached_property
    def correctness_PK(self) -> np.ndarray:
        """float64 [P, K]: 1 correct, 0 wrong, truncated or unparsable, NaN where the grader failed."""
        right_PK = (self.verdict_PK == Verdict.CORRECT).astype(np.float64)
        return np.where(self.verdict_PK == Verdict.ERROR, np.nan, right_PK)

    @cached_property
    def tokens_PK(self) -> np.ndarray:
        """Tokens of each completion, the end token included, int64 [P, K]."""
        return np.array([[len(ids) for ids in row["completion_ids"]] for row in self.rows], dtype=np.int64)

    @property
    def mean_tokens(self) -> float:
        return float(self.tokens_PK.mean())

    @property
    def truncated_share(self) -> float:
        """Share of samples that did not end, or did not end their reasoning, within the token budget."""
        return float((self.verdict_PK == Verdict.TRUNCATED).mean())

    @property
    def grader_errors(self) -> int:
        return int((self.verdict_PK == Verdict.ERROR).sum())

    @property
    def texts(self) -> list[list[str]]:
        return [row["generations"] for row in self.rows]

    @property
    def answers(self) -> list[list[str | None]]:
        """The answers to vote on: equal ones are equal text. All correct answers count as one (1/2 and 0.5), others as
        they were read up to white space; None where none could be read."""
        return [[_ballot(v, e) for v, e in zip(row["verdict"], row["extracted"])] for row in self.rows]


def load_result(folder: StageFolder, model: str, set_name: str = "eval") -> EvalResult:
    """A model's result read back from its shards alone, each verified by its checksum first."""
    shards = [
        shard
        for shard in folder.shards()
        if shard.name.endswith(".parquet") and (shard.info.get("set"), shard.info.get("name")) == (set_name, model)
    ]
    if not shards:
        raise StoreError(
            f"no {set_name} results of {model}", where=str(folder.path), remedy="Run again with --stages eval."
        )
    rows: list[dict] = []
    for shard in shards:
        rows += read_rows(folder.check_shard(shard.name).path, SCHEMA.names)
    return EvalResult(_candidate_of(shards[0]), rows)


def evaluated(folder: StageFolder, set_name: str = "eval") -> list[Candidate]:
    """The models that have results in the folder: teacher first, then bases, then students by base, response first."""
    found = {
        shard.info["name"]: _candidate_of(shard)
        for shard in folder.shards()
        if shard.name.endswith(".parquet") and shard.info.get("set") == set_name
    }
    order = {"teacher": 0, "base": 1, "student": 2}
    return sorted(found.values(), key=lambda c: (order.get(c.role, 3), c.base, c.loss != "response", c.name))


def slug(name: str) -> str:
    """The name where it can be a file name; otherwise a readable part and a digest, so that no two names collide."""
    plain = re.sub(r"[^\w.-]+", "-", name)
    return name if plain == name else f"{plain}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def _ballot(verdict: str, extracted: str | None) -> str | None:
    if verdict == Verdict.CORRECT:
        return "correct"
    return None if extracted is None else "read: " + " ".join(extracted.split())


def _candidate_of(shard: Shard) -> Candidate:
    return Candidate(**{key: shard.info.get(key, "") for key in ("name", "role", "base", "loss", "fingerprint")})


def candidate(name: str, role: str, path: str, **more: str) -> Candidate:
    """A model of the evaluation, identified by its weights."""
    return Candidate(name=name, role=role, fingerprint=fingerprint_checkpoint(resolve_checkpoint(path)), **more)


def base_name(student: Student, students: Sequence[Student]) -> str:
    """ "base" where all students start from one model, else "base-" and the folder's name."""
    return "base" if len({each.path for each in students}) == 1 else f"base-{Path(student.path).name}"
