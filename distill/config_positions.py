"""Whether the models have as many positions as the completions that are asked of them, from their config.json alone."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from distill.errors import ConfigError, DistillError

if TYPE_CHECKING:
    from distill.config import Config


def misfit_for_positions(config: Config) -> Iterator[DistillError]:
    """ConfigErrors for models, here or in the Hub's cache, that cannot write one completion of the length asked for:
    otherwise the first prompt says so, and for a student that is behind all the training."""
    held_out = ("eval.max_new_tokens", config.eval.max_new_tokens)
    traces = ("teacher.sampling.max_new_tokens", config.teacher.sampling.max_new_tokens)
    models = [] if config.teacher.url else [("teacher.path", config.teacher.path, [traces, held_out])]
    models += [(f"students.{i}.path", each.path, [held_out]) for i, each in enumerate(config.students)]
    for name, path, budgets in models:
        positions = _positions(path)
        for setting, tokens in budgets if positions else ():
            if tokens >= positions:
                yield ConfigError(
                    f"{setting} is {tokens}, but {name} is {path}, which has {positions} positions for prompt and "
                    "completion",
                    remedy="Lower it, or copy the model's folder, raise max_position_embeddings in its config.json as "
                    f"far as the training is to take it, and give that folder as {name}.",
                )


def _positions(path: str) -> int | None:
    """None where config.json is not here or does not say: what is wrong with a checkpoint is said elsewhere."""
    file: object = Path(path, "config.json")
    if not Path(path).is_dir():
        from huggingface_hub import try_to_load_from_cache  # a tenth of a second that only Hub ids pay for
        from huggingface_hub.errors import HFValidationError

        file = None
        with suppress(HFValidationError):
            file = try_to_load_from_cache(path, "config.json")
    if not isinstance(file, str | Path):
        return None
    with suppress(OSError, ValueError, AttributeError):
        found = json.loads(Path(file).read_bytes()).get("max_position_embeddings")
        return found if isinstance(found, int) else None
    return None
