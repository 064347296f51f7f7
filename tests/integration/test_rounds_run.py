"""Rounds in which a student learns from what it wrote: the same weights whether or not they were interrupted."""

import json
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from launches import ROOT, copy_run, distill, environment, numbers, run, run_until, sha256, small_config, write_config

pytestmark = pytest.mark.slow


@dataclass
class Trained:
    folder: Path
    out: str


def in_rounds(reference: Callable, scratch: Path, stop_at: str | None) -> Trained:
    """Two rounds, uninterrupted or killed as soon as the file `stop_at` is there and then launched again."""
    config = small_config(scratch / "runs")
    logits = config["students"][1]
    config["students"] = [logits | {"name": "same", "path": str(ROOT / "teachers" / "tiny" / "student-same")}]
    config["train"] |= {"epochs": 20, "lr": 2e-3, "checkpoint_steps": 20}
    config["train"]["on_policy"] = {"rounds": 2, "prompts": 16}
    folder = copy_run(reference().folder, scratch / "runs", "4-student")
    command = distill(write_config(scratch / "small.yaml", config), "--stages", "train")
    if stop_at:
        run_until(command, scratch, (folder / "4-student" / "same" / stop_at).exists, signal.SIGKILL)
    return Trained(folder / "4-student" / "same", run(command, scratch, environment(scratch)).ok().out)


def uninterrupted(case: None, reference: Callable, scratch: Path) -> Trained:
    return in_rounds(reference, scratch, None)


def killed(case: str, reference: Callable, scratch: Path) -> Trained:
    return in_rounds(reference, scratch, case)


@pytest.mark.ahead(outcome=uninterrupted)
def test_two_rounds_are_said_read_and_trained_on(outcome):
    counts = json.loads((outcome.folder / "train.json").read_text())
    for number in (1, 2):
        said = json.loads((outcome.folder / f"round-{number}" / "said" / "manifest.json").read_text())["counts"]
        read = json.loads((outcome.folder / f"round-{number}" / "read" / "manifest.json").read_text())["counts"]
        assert (
            said["said"] == 16 == read["read"] + said["truncated"] + said["unclosed"] + said["not_utf8"]
            and read["read"] > 4
        )
        assert counts[f"round_{number}_said_trained_tokens"] == read["tokens"]
    log = [json.loads(line) for line in (outcome.folder / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in log] == list(range(1, counts["steps"] + 1)) and log[-1]["round"] == 2
    later = [row for row in log if row["round"]]
    assert all(0 < row["loss"] < log[0]["loss"] for row in later)
    assert {name for row in later for name in row if name.startswith("loss/")} == {"loss/traces", "loss/said"}


CASES = ["round-1/said/said-00000.jsonl.json", "round-1/read/said-00000.cache.json", "round-2/said/manifest.json"]


@pytest.mark.ahead(outcome=killed)
@pytest.mark.parametrize("case", CASES)
def test_a_killed_launch_ends_in_the_same_weights(case, outcome, started):
    whole = started[uninterrupted, None].result() if (uninterrupted, None) in started else None
    assert whole is not None, "run the whole file"
    assert sha256(outcome.folder / "model" / "model.safetensors") == sha256(
        whole.folder / "model" / "model.safetensors"
    )
    logs = [
        numbers([json.loads(line) for line in (t.folder / "log.jsonl").read_text().splitlines()])
        for t in (whole, outcome)
    ]
    assert logs[0] == logs[1]
