"""A tiny prepared run, trainings of it in forked processes, and what two trainings must have in common."""

import json
import sys
from pathlib import Path

import pytest
import torch
from forked_trainings import Trainings
from safetensors.torch import load_file

from benchmarks.compare_losses import compare, read_log

sys.path.append(str(Path(__file__).parents[1] / "unit" / "students"))

METRICS = ("loss", "ce", "kl", "entropy", "tail", "grad_norm", "lr", "tokens")
TIMES = ("tokens_per_s", "step_s", "data_wait_s")
TOLERANCE = 1e-5
WEIGHTS = 3e-5  # one update moves a weight by up to 3e-3; Adam divides rounding by gradients that are almost 0


@pytest.fixture(scope="session")
def trainings():
    client = Trainings()
    yield client
    client.close()


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> Path:
    """A folder with model/ (a Qwen3 with a tied head) and run/ with 24 traces and their distributions."""
    from student_world import make_model, make_stages, make_traces

    from distill.tokens import load_tokenizer

    root = tmp_path_factory.mktemp("world")
    tokenizer = load_tokenizer(make_model(root / "model"))
    make_stages(root, tokenizer, make_traces(tokenizer, 24))
    return root


def same_losses(found: Path, expected: Path) -> None:
    """The same steps, and every number of each within 1e-5."""
    rows = [read_log(folder / "log.jsonl") for folder in (found, expected)]
    verdict = compare(*rows, metrics=METRICS, tolerance=TOLERANCE)
    assert verdict.same, verdict
    ours, theirs = weights(found), weights(expected)
    assert ours.keys() == theirs.keys()
    assert max((ours[name] - theirs[name]).abs().max().item() for name in theirs) < WEIGHTS


def same_bits(found: Path, expected: Path) -> None:
    """The same log, times aside, and the same weights, to the last bit."""
    ours, theirs = weights(found), weights(expected)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert log(found) == log(expected)


def log(folder: Path) -> list[dict]:
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name not in TIMES} for row in rows]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "model.safetensors")
