"""A rank's part of a checkpoint as it is now, written later, so that the training goes on meanwhile."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from distill import files


class Snapshots:
    """Stands in for DeepSpeed's checkpoint engine: what it is told to save is copied to main memory and kept.

    DeepSpeed's own decoupled engine writes from the live tensors and stops the next optimizer step until it has; it
    also compiles an operator. Everything but saving is left to the engine that was there.
    """

    def __init__(self, inner: Any):
        self._inner = inner
        self._taken: list[tuple[Path, Any]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def save(self, state_dict: dict, path: str) -> None:
        """Keeps a copy of the content of one file: tensors by name for .safetensors, anything for other names."""
        self._taken.append((Path(path), copied(state_dict)))

    def take(self) -> Callable[[], None]:
        """Writes and syncs what was kept since the last call. It may run in another thread: nothing live is read."""
        taken, self._taken = self._taken, []
        return partial(_write, taken)


def _write(taken: list[tuple[Path, Any]]) -> None:
    while taken:
        path, content = taken.pop(0)  # a written file's copy is not kept until the last is written
        try:
            save_file(content, path) if path.suffix == ".safetensors" else torch.save(content, path)
            files.sync(path)
        except BaseException:
            path.unlink(missing_ok=True)  # on a full disk there is room again to say so
            raise


def copied(value: Any, seen: dict | None = None) -> Any:
    """The same value with every tensor copied to main memory; tensors that share their elements share the copy.

    Lists, tuples and dicts are made anew, other objects are taken as they are.
    """
    seen = {} if seen is None else seen
    if isinstance(value, torch.Tensor) and not value.is_meta:
        place = (value.untyped_storage().data_ptr(), value.storage_offset(), value.shape, value.stride(), value.dtype)
        if place not in seen:
            seen[place] = value.detach().to("cpu", copy=True)
        return seen[place]
    if isinstance(value, dict):
        return {key: copied(each, seen) for key, each in value.items()}
    if type(value) in (list, tuple):
        return type(value)(copied(each, seen) for each in value)
    return value
