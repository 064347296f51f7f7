"""What the settings of rows that several devices share, and of activations, must agree on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from distill.config_load import Loc, Origin, Problem
from distill.errors import ConfigError, DistillError

if TYPE_CHECKING:
    from distill.config import Config

OWN: Loc = ("train", "sequence_parallel")


def sequence_problems(config: Config, origin: Origin) -> Iterator[Problem]:
    """Numbers of devices that cannot share a row, and settings that would do nothing."""
    train, gpus = config.train, config.hardware.gpus
    if gpus % train.sequence_parallel:
        must = f"it must divide hardware.gpus, {gpus}. Use a divisor of it, or 1."
        yield Problem((OWN, ("hardware", "gpus")), f"{origin.name(OWN)} is {train.sequence_parallel}; {must}")
    for i, student in enumerate(config.students):
        if student.geometry is not None and student.geometry.heads % train.sequence_parallel:
            loc: Loc = ("students", i, "geometry", "heads")
            must = _must(student.geometry.heads, student.name)
            yield Problem((OWN, loc), f"{origin.name(OWN)} is {train.sequence_parallel}; {must}")
    if train.kept_activations != "attention" and not train.activation_checkpointing:
        kept: Loc = ("train", "kept_activations")
        must = "without train.activation_checkpointing everything is kept. Set that to true, or leave this out."
        yield Problem((kept, ("train", "activation_checkpointing")), f"{origin.name(kept)} is 'products'; {must}")


def misfit_for_sequence(config: Config) -> Iterator[DistillError]:
    """ConfigErrors for students whose checkpoint here has a number of attention heads that cannot be shared out."""
    for student in config.students:
        heads = None
        with suppress(OSError, ValueError, AttributeError):  # what is wrong with a checkpoint is said elsewhere
            heads = json.loads((Path(student.path) / "config.json").read_bytes()).get("num_attention_heads")
        if isinstance(heads, int) and heads % config.train.sequence_parallel:
            where = f"train.sequence_parallel is {config.train.sequence_parallel}"
            yield ConfigError(f"{where}; {_must(heads, student.name)}")


def _must(heads: int, name: str) -> str:
    return f"it must divide the {heads} attention heads of student {name}. Use a divisor of both, or 1."
