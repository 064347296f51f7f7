"""What a training writes down step by step: log.jsonl, spikes.jsonl and the tracker's curves."""

import json
from collections.abc import Sequence
from pathlib import Path

from distill import files
from distill.dist import Ranks
from distill.tracking import Tracker
from students.metrics import SPIKE_Z, Spikes

LOG, SPIKES = "log.jsonl", "spikes.jsonl"


class TrainLog:
    """The log of one student in its folder. All ranks call it, rank 0 writes."""

    def __init__(self, folder: Path, ranks: Ranks, tracker: Tracker, scope: str):
        self.folder, self.ranks, self.tracker, self.scope = folder, ranks, tracker, scope
        self._spikes = Spikes()

    def go_on_after(self, steps: int) -> None:
        """Takes back what was written of later steps: a killed launch may have logged some after its last
        checkpoint."""
        rows, _ = self.ranks.on_main(lambda: [_cut(self.folder / name, steps) for name in (LOG, SPIKES)])
        self._spikes = Spikes([row["loss"] for row in rows])

    def write(self, row: dict[str, float], traces: Sequence[Sequence[str]]) -> None:
        """A step's row, with how far its loss stands out; one that stands out far goes to spikes.jsonl too, with the
        keys of its traces."""
        z = self._spikes.z(row["loss"])
        if z is not None:
            row = row | {"loss_z": z}
        if self.ranks.is_main:
            self._append(LOG, row)
            if z is not None and z > SPIKE_Z:
                spike = {name: row[name] for name in ("step", "loss", "loss_z", "grad_norm")}
                self._append(SPIKES, spike | {"traces": traces})
                told = f"the loss {row['loss']:.4g} stands out by {z:.3g} deviations"
                self.ranks.print(f"\nstep {row['step']}: {told}; its traces are in {self.folder / SPIKES}")
        named = {f"train/{name}": value for name, value in row.items() if name != "step"}
        self.tracker.log(named, row["step"], scope=self.scope)

    def _append(self, name: str, row: dict) -> None:
        with files.disk_errors(self.folder), open(self.folder / name, "a") as file:
            file.write(json.dumps(row) + "\n")


def _cut(path: Path, steps: int) -> list[dict]:
    """Keeps the rows of the first `steps` steps, and returns them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:  # the kill cut it short
            break
    rows = [row for row in rows if row["step"] <= steps]
    with files.disk_errors(path.parent), files.replacing(path) as temporary:
        temporary.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows
