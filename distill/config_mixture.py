"""Settings of what a student is trained on beside the run's own traces: other runs' traces, texts, general data."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from distill.config_load import Loc, Origin, Problem
from distill.config_types import NAME, Int, Section, setting
from distill.errors import DataError, DistillError, StoreError

if TYPE_CHECKING:
    from distill.config import Config

RESERVED_NAMES = ("traces", "general", "said")  # sets that have their names already


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


TextSource = Annotated[GeneralJsonl | GeneralHuggingFace, Field(discriminator="kind")]


class TextSet(Section):
    """Conversations that the teacher did not sample: people's, or another model's.

    It reads them when traces are made (3-logits/NAME), and students with kind logits learn its distributions over the
    assistant's tokens. The text is no sample of the teacher, so its cross-entropy would teach its writer: with alpha 1
    no token is learned as such. Students with kind response leave the set out.
    """

    name: str = setting(..., "name in metrics (train/loss/<name>)", pattern=NAME, use="Use letters, digits, . _ and -.")
    source: TextSource = setting(..., "where the conversations are; every turn of the assistant is read")
    max_tokens: Int = setting(
        32768, "longest conversation, in the teacher's tokens; others are counted and left out", unit="tokens", ge=8
    )
    weight: float = setting(1.0, "passes over this set in an epoch; 0.5: another half in every epoch", gt=0, le=100)
    alpha: float = setting(
        1.0, "weight of the divergence; the rest is cross-entropy on the text, which learns its writer", gt=0, le=1,
        use="Use 1.0 to learn from the teacher alone.",
    )  # fmt: skip


class OnPolicy(Section):
    """After the traces: rounds in which a student of kind logits answers training prompts itself, drawn as traces are
    (teacher.sampling), the teacher reads what it said, and the student is trained on the teacher's distributions over
    it, and on traces as before.

    On its own text the divergence stands alone; completions that were cut short are counted and left out.
    """

    rounds: Int = setting(1, "how often the student writes, is read and trained", unit="rounds", ge=1, le=100)
    prompts: Int | None = setting(
        None, "training prompts of a round, others in each; null takes all", unit="prompts", ge=1
    )
    share: float = setting(
        0.5, "of a round's tokens that the student wrote; the others are of traces", ge=0.01, lt=1, use="Use 0.5."
    )
    lr_ratio: float = setting(0.1, "peak learning rate of a round over train.lr", gt=0, le=1)


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
    """Sets that cannot be told apart, or that nobody can learn from, one sentence each with the remedy."""
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
    taken = {*RESERVED_NAMES, *(each.name for each in config.train.trace_sets)}
    for i, each in enumerate(config.train.text_sets):
        loc = ("train", "text_sets", i, "name")
        if each.name in taken:
            yield Problem((loc,), f"{origin.name(loc)} is {each.name!r}; that set is there already. Use another name.")
        if each.name.endswith((".json", ".cache")):
            must = "its folder in 3-logits would have the name of a file there. Use another name."
            yield Problem((loc,), f"{origin.name(loc)} is {each.name!r}; {must}")
        taken.add(each.name)
    loc = ("train", "text_sets")
    if config.train.text_sets and config.teacher.capture is None:
        must = "but teacher.capture is null, so no distribution would be stored. Set teacher.capture.k_max: 64."
        yield Problem((loc, ("teacher", "capture")), f"{origin.name(loc)} is given; {must}")
    if config.train.text_sets and all(student.loss.kind == "response" for student in config.students):
        must = "but no student has loss.kind logits, and others learn nothing from text that the teacher did not say. "
        yield Problem((loc, ("students",)), f"{origin.name(loc)} is given; {must}Remove it, or use kind: logits.")

    policy, loc = config.train.on_policy, ("train", "on_policy")
    if policy is not None and config.teacher.capture is None:
        must = "but teacher.capture is null, so no distribution would be stored. Set teacher.capture.k_max: 64."
        yield Problem((loc, ("teacher", "capture")), f"{origin.name(loc)} is given; {must}")
    if policy is not None and all(student.loss.kind == "response" for student in config.students):
        must = "but no student has loss.kind logits, which it trains. Remove it, or use kind: logits."
        yield Problem((loc, ("students",)), f"{origin.name(loc)} is given; {must}")


def missing_for_mixture(config: Config) -> Iterator[DistillError]:
    """Files and runs that the training reads and that are not here: told before the hours that traces take."""
    train = config.train
    for i, each in enumerate(train.trace_sets):
        if not Path(each.run, "2-traces", "manifest.json").is_file():
            yield StoreError(
                f"train.trace_sets.{i}.run is {each.run}, and no run there has finished its traces",
                remedy="Give the folder of a run such as runs/math, and run its traces first.",
            )
    named = [(f"train.general.sources.{i}", s) for i, s in enumerate(train.general.sources if train.general else ())]
    named += [(f"train.text_sets.{i}.source", each.source) for i, each in enumerate(train.text_sets)]
    for name, source in named:
        if source.kind == "bundled":
            continue
        path, remote = Path(source.path), source.kind == "hf" and not source.path.startswith((".", "/", "~"))
        if not (path.is_file() or remote or (source.kind == "hf" and path.is_dir())):
            yield DataError(
                f"{name}.path is {source.path}, and there is no such file",
                remedy="Correct the path; relative ones are taken from the folder in which the command runs.",
            )
        elif path.exists() and not os.access(path, os.R_OK):
            yield DataError(f"{name}.path is {source.path}, which may not be read", remedy="Give this user the right.")
