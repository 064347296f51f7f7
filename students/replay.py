"""A step that was refused, once more and row by row: `python -m students.replay runs/NAME/4-student/S/nan-step-7`.

The folder holds the weights of before the step and the step's rows as they were trained. Each row is run alone, forward
and backward, and told with its loss, its gradient norm and the first module whose output is not finite: where all rows
are fine alone, lower train.lr or train.clip_norm; where one is not, look at its traces.

Shape legend: N tokens of a row, M trained positions.
"""

import argparse
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from distill import files
from distill.errors import DataError, DistillError
from distill.losses.buckets import BucketedTargets
from distill.losses.sparse import SparseTargets
from students.data import Batch
from students.model import load_student, train_dtype
from students.step import LossSettings, StudentStep

ROWS, MODEL, REPORT = "rows.safetensors", "model", "report.json"
_TARGETS = {"sparse": SparseTargets, "bucketed": BucketedTargets}


def save_rows(path: Path, batches: list[Batch], settings: LossSettings, normalizer: float, sets: int) -> None:
    """Writes the rows of a step, each as a micro-batch of its own, with how their loss is taken."""
    tensors, rows = {}, []
    for number, batch in enumerate(batches):
        own = {name: value for name, value in vars(batch).items() if isinstance(value, torch.Tensor)}
        kind = next((kind for kind, made in _TARGETS.items() if isinstance(batch.targets, made)), None)
        targets = {name: value for name, value in vars(batch.targets).items() if value is not None} if kind else {}
        own |= {f"targets.{name}": value for name, value in targets.items()}
        tensors |= {f"{number}/{name}": value.contiguous() for name, value in own.items()}
        rows.append({"keys": batch.keys, "seq_lens": batch.seq_lens, "targets": kind})
    about = {"rows": rows, "loss": asdict(settings), "normalizer": normalizer, "sets": sets}
    save_file(tensors, path, metadata={"about": json.dumps(about)})
    files.sync(path)


def read_rows(path: Path) -> tuple[list[Batch], dict]:
    """(batches, {loss, normalizer, sets, ...}) as save_rows wrote them; DataError if they cannot be read."""
    try:
        with safe_open(path, "pt") as file:
            about = json.loads(file.metadata()["about"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, KeyError, TypeError, ValueError) as error:
        remedy = "Give the folder nan-step-N that a stopped training wrote."
        raise DataError(f"these are no rows of a step: {error}", where=str(path), remedy=remedy) from error
    return [_row(number, row, tensors) for number, row in enumerate(about["rows"])], about


def _row(number: int, row: dict, tensors: dict[str, torch.Tensor]) -> Batch:
    own = {name.partition("/")[2]: t for name, t in tensors.items() if name.startswith(f"{number}/")}
    plain = {name: value for name, value in own.items() if not name.startswith("targets.")}
    outcomes = {name.partition(".")[2]: value for name, value in own.items() if name.startswith("targets.")}
    targets = _TARGETS[row["targets"]](**outcomes) if row["targets"] else None
    return Batch(**plain, seq_lens=row["seq_lens"], keys=row["keys"], targets=targets)


def replay(folder: Path, device: torch.device, dtype: torch.dtype) -> Iterator[dict]:
    """For each row: keys, loss, grad_norm, and first_bad, the first module whose output is not finite, or None."""
    batches, about = read_rows(folder / ROWS)
    model, _ = load_student(folder / MODEL, dtype)
    step = StudentStep(model.to(device), LossSettings(**about["loss"]), about["sets"])
    for batch in batches:
        step.zero_grad()
        with first_not_finite(step) as bad:
            loss, _ = step(batch.to(device), about["normalizer"])
            loss.backward()
        norm = nn.utils.get_total_norm([p.grad for p in step.parameters() if p.grad is not None])
        yield {"keys": batch.keys, "loss": loss.item(), "grad_norm": norm.item(), "first_bad": bad[0] if bad else None}


class first_not_finite:
    """Names of modules whose output held a number that is not finite, in the order of the forward pass."""

    def __init__(self, root: nn.Module):
        self.found: list[str] = []
        named = [(name, module) for name, module in root.named_modules() if name]
        self.hooks = [module.register_forward_hook(self._look(name)) for name, module in named]

    def _look(self, name: str):
        def look(_module, _inputs, output) -> None:
            first = output[0] if isinstance(output, tuple) else output
            if isinstance(first, torch.Tensor) and first.is_floating_point() and not first.isfinite().all():
                self.found.append(name)

        return look

    def __enter__(self) -> list[str]:
        return self.found

    def __exit__(self, *_: object) -> None:
        for hook in self.hooks:
            hook.remove()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m students.replay", description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, help="nan-step-N, written by a training that stopped")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"))
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    try:
        rows = list(replay(args.folder, device, train_dtype(args.dtype, device)))
    except DistillError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    for number, row in enumerate(rows):
        bad = not (math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"]))
        mark, where = ("!", f"  first in {row['first_bad']}") if bad else (" ", "")
        where = where if row["first_bad"] else ""
        print(f"{mark} row {number:3d}  loss {row['loss']:.6g}  grad norm {row['grad_norm']:.6g}{where}")
        print(f"    {', '.join(row['keys'])}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
