"""Settings of what a student is trained on beside the run's own traces: other runs' traces, and general data."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from distill.config_load import Loc, Origin, Problem
from distill.config_types import NAME, Int, Section, setting
from distill.errors import DataError, DistillError, StoreError

if TYPE_CHECKING:
    from distill.config import Config

RESERVED_NAMES = ("traces", "general")  # sets that have their names already


class TraceSet(Section):
    """The kept traces of another finished run; a student with kind logits needs its 3-logits too."""

    name: str = setting(..., "name in metrics (train/loss/<name>)", pattern=NAME, use="Use letters, digits, . _ and -.")
    run: str = setting(..., "folder of that run, such as runs/math", min_length=1)
    weight: float = setting(1.0, "passes over this set in an epoch; 0.5: another half in every epoch", gt=0, le=100)


class BundledQuestions(Section):
    """Short questions with direct answers (distill/tasks/general.py), none of which is for evaluation."""

    kind: Literal["bundled"] = "bundled"
    per_kind: Int = setting(400, "questions of each kind, where there are so many", unit="questions", ge=1)
    seed: Int = setting(0, "seed of the generator", ge=0, lt=2**31)


class GeneralJsonl(Section):
    """A file with one JSON object a line."""

    kind: Literal["jsonl"] = "jsonl"
    path: str = setting(..., "the file", min_length=1)
    field: str = setting("messages", "field with a conversation, [{role, content}, ...], or with plain text")
    limit: Int | None = setting(None, "first rows to take; null takes all", unit="rows", ge=1)


class GeneralHuggingFace(Section):
    """A dataset: a local folder or a Hub id."""

    kind: Literal["hf"] = "hf"
    path: str = setting(..., "folder or Hub id", min_length=1)
    subset: str | None = setting(None, "configuration of the dataset, where it has several")
    split: str = setting("train", "split of the dataset")
    field: str = setting("messages", "column with a conversation, [{role, content}, ...], or with plain text")
    limit: Int | None = setting(None, "first rows to take; null takes all", unit="rows", ge=1)


GeneralSource = Annotated[BundledQuestions | GeneralJsonl | GeneralHuggingFace, Field(discriminator="kind")]


class General(Section):
    """General data, so that a student keeps what its base could do.

    kl_to_base: before training, the base answers each conversation itself (and reads each text), and its distributions
    are stored once in 4-student/NAME/general; the student is held to them. ce: cross-entropy on the data's own answers.
    """

    sources: list[GeneralSource] = setting(
        [BundledQuestions()], "where the data comes from; never what the evaluation asks", min_length=1
    )
    share: float = setting(
        0.1, "of the tokens of an epoch; data is repeated or left out to meet it", gt=0, lt=1, use="Use 0.1."
    )
    weight: float = setting(
        1.0, "of its tokens' loss beside that of a trace's; more holds on to the base harder", gt=0, le=100
    )
    loss: Literal["kl_to_base", "ce"] = setting("kl_to_base", "what the student learns from the data")
    temperature: float = setting(1.0, "of the base's answers", ge=0, use="Use 1.0, or 0 for greedy answers.")
    max_new_tokens: Int = setting(512, "budget of an answer of the base", unit="tokens", ge=1)


def mixture_problems(config: Config, origin: Origin) -> Iterator[Problem]:
    """Sets of traces that cannot be told apart, one sentence each with the remedy."""
    first: dict[str, int] = {}
    for i, each in enumerate(config.train.trace_sets):
        loc: Loc = ("train", "trace_sets", i, "name")
        if each.name in RESERVED_NAMES:
            yield Problem((loc,), f"{origin.name(loc)} is {each.name!r}; that set is there already. Use another name.")
        if first.setdefault(each.name, i) != i:
            must = f"train.trace_sets.{first[each.name]} has that name too. Give each set its own."
            yield Problem((loc,), f"{origin.name(loc)} is {each.name!r}; {must}")
        loc = ("train", "trace_sets", i, "run")
        if Path(each.run) == Path(config.run.dir, config.run.name):
            must = "that is this run, whose traces are trained on anyway. Remove the set."
            yield Problem((loc,), f"{origin.name(loc)} is {each.run!r}; {must}")


def missing_for_mixture(config: Config) -> Iterator[DistillError]:
    """Files and runs that the training reads and that are not here: told before the hours that traces take."""
    train = config.train
    for i, each in enumerate(train.trace_sets):
        if not Path(each.run, "2-traces", "manifest.json").is_file():
            yield StoreError(
                f"train.trace_sets.{i}.run is {each.run}, and no run there has finished its traces",
                remedy="Give the folder of a run such as runs/math, and run its traces first.",
            )
    for i, source in enumerate(train.general.sources if train.general else ()):
        if source.kind == "jsonl" and not Path(source.path).is_file():
            yield DataError(
                f"train.general.sources.{i}.path is {source.path}, and there is no such file",
                remedy="Correct the path; relative ones are taken from the folder in which the command runs.",
            )
