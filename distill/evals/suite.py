"""A run's whole evaluation: every model in turn through the one harness, then agreement with the teacher and retention.

Models are opened one at a time, and only when something of theirs is missing. The caller says how to open one: this
module knows neither teachers nor students.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from distill.align_report import coverage_text
from distill.align_tables import default_cache_dir
from distill.dist import Ranks
from distill.evals.agreement import StudentScore, agreement
from distill.evals.harness import Grader, Sampler, evaluate, is_evaluated
from distill.evals.results import Candidate
from distill.evals.retention import SET_NAME as RETENTION
from distill.evals.retention import retention_params
from distill.evals.run_files import agreement_file, read_agreement
from distill.evals.teacher_text import teacher_traces
from distill.records import CaptureSpec, Prompt, SamplingParams
from distill.split import Split
from distill.store import StageFolder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class Opened:
    """A model in memory. `score` (distill.evals.agreement.dense_scorer) is needed of students only; `split` of a model
    that several ranks hold together, None where each has its own."""

    sampler: Sampler
    score: StudentScore | None = None
    split: Split | None = None


@dataclass(frozen=True)
class Entrant:
    """A model of the evaluation: what it is, its tokenizer, and how its weights get into memory and out again."""

    candidate: Candidate
    tokenizer: PreTrainedTokenizerFast
    open: Callable[[], AbstractContextManager[Opened]]


@dataclass(frozen=True)
class Suite:
    """What every model is asked. capture: the teacher's distributions to keep for agreement, None for no agreement;
    agreement_traces: how many of its completions are scored; retention: general questions, empty for none."""

    prompts: Sequence[Prompt]
    params: SamplingParams
    k: int
    run_seed: int = 0
    capture: CaptureSpec | None = None
    agreement_traces: int = 200
    retention: Sequence[Prompt] = ()
    retention_tokens: int = 256
    confidence: float = 0.95
    shard_prompts: int = 32


def run_suite(suite: Suite, entrants: Sequence[Entrant], folder: StageFolder, grader: Grader, ranks: Ranks) -> None:
    """Fills the opened eval folder with every result that is missing; called by all ranks.

    The teacher goes first: students are measured on its completions. Agreement is taken on rank 0 alone, with the ranks
    that hold the student together with it.
    """
    order = {"teacher": 0, "base": 1, "student": 2}
    entrants = sorted(entrants, key=lambda entrant: order[entrant.candidate.role])
    teachers = [entrant for entrant in entrants if entrant.candidate.role == "teacher"]
    for entrant in entrants:
        teacher = teachers[0] if teachers and suite.capture and entrant.candidate.role == "student" else None
        _run_entrant(suite, entrant, teacher, folder, grader, ranks)


def _run_entrant(
    suite: Suite, entrant: Entrant, teacher: Entrant | None, folder: StageFolder, grader: Grader, ranks: Ranks
) -> None:
    sets = _sets(suite, entrant.candidate.role)
    missing = ranks.on_main(lambda: [s for s in sets if not is_evaluated(entrant.candidate, folder, **sets[s])])
    scored = teacher is None or ranks.on_main(lambda: read_agreement(folder.path, entrant.candidate) is not None)
    if not missing and scored:
        return
    with entrant.open() as model:
        split = model.split or Split(rank=ranks.rank, world=ranks.world)
        for name in missing:
            evaluate(
                entrant.candidate,
                model.sampler,
                entrant.tokenizer,
                grader=grader,
                folder=folder,
                rank=split.share,
                world=split.shares,
                devices=split.tensor_parallel,
                writes=split.tensor_rank == 0,
                barrier=ranks.barrier,
                **sets[name],
            )
        if not scored and split.size == 1:
            ranks.on_main(lambda: _measure(suite, entrant, teacher, model.score, folder))
        elif not scored:  # the ranks that hold the first copy compute it together
            if ranks.rank < split.size:
                _measure(suite, entrant, teacher, model.score, folder, writes=ranks.is_main)
            ranks.barrier()


def _sets(suite: Suite, role: str) -> dict[str, dict]:
    """The arguments of evaluate and is_evaluated for each set of prompts of a model with this role."""
    common = {"run_seed": suite.run_seed, "shard_prompts": suite.shard_prompts}
    capture = suite.capture if role == "teacher" else None
    held_out = {"prompts": suite.prompts, "params": suite.params, "k": suite.k, "set_name": "eval", "capture": capture}
    sets = {"eval": held_out | common}
    if suite.retention and role != "teacher":
        params = retention_params(suite.retention_tokens)
        general = {"prompts": suite.retention, "params": params, "k": 1, "set_name": RETENTION, "capture": None}
        sets[RETENTION] = general | common
    return sets


def _measure(
    suite: Suite, entrant: Entrant, teacher: Entrant, score: StudentScore, folder: StageFolder, writes: bool = True
) -> None:
    row = agreement(
        entrant.candidate.name,
        teacher_traces(folder, teacher.candidate.name, suite.agreement_traces),
        score,
        teacher=teacher.tokenizer,
        own=entrant.tokenizer,
        confidence=suite.confidence,
        tables_dir=default_cache_dir(),
    )
    if not writes:
        return
    if row["covered_share"] < 1:
        print(f"what is known of {row['student']}'s tokens of the teacher's text:\n{coverage_text(row['coverage'])}")
    folder.write_json(agreement_file(entrant.candidate), {**row, "fingerprint": entrant.candidate.fingerprint})
