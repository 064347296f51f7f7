"""8-bit moments, weights without masters, the moving average and what is in files, on other ranks and ZeRO stages."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from launch_resharding import LR
from student_world import make_model

LAUNCH = Path(__file__).with_name("launch_resharding.py")
NARROW = {"optimizer": "adamw8bit", "ema_decay": 0.7}
WIDE = {"ema_decay": 0.7}
PLAIN = {"master_weights": "none", "ema_decay": 0.7}
GAPS = {"exp_avg": 0.0142, "exp_avg_sq": 0.0071}  # the most that neighbouring codes differ by, over the block's scale


class Training:
    """What the launches of one training wrote into its folder."""

    def __init__(self, folder: Path, launches: int):
        numbers = range(launches)
        self.loaded = [torch.load(folder / f"{n}-loaded.pt") for n in numbers[1:]]
        self.saved = [torch.load(folder / f"{n}-saved.pt") for n in numbers]
        self.losses = [loss for n in numbers for loss in json.loads((folder / f"{n}-losses.json").read_text())]


def launched(root: Path, dtype: str, trainings: dict[str, list], **model) -> dict[str, Training]:
    """name -> training, of launches of (ranks, stage, settings)."""
    make_model(root / "model", **model)
    for name in trainings:
        (root / name).mkdir()
    asked = {"dtype": dtype, "trainings": {str(root / name): each for name, each in trainings.items()}}
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    command = [sys.executable, str(LAUNCH), str(root / "model"), json.dumps(asked)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=280)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-4000:]
    return {name: Training(root / name, len(launches)) for name, launches in trainings.items()}


def same(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def goes_on(before: dict, after: dict, narrow: bool) -> None:
    """Weights, their average and moments are those of before; moments of 8 bits are as near as their codes allow."""
    same(after["weights"], before["weights"])
    same(after["average"], before["average"])
    assert any(not torch.equal(after["average"][name], after["weights"][name]) for name in after["weights"])
    for part, gap in GAPS.items():
        for name, expected in before[part].items():
            scale = after[f"{part} scale"][name]
            if scale is None:
                assert torch.equal(after[part][name], expected)
            else:
                assert ((after[part][name] - expected).abs() <= gap / 2 * scale).all()
        assert any(scale is not None for scale in after[f"{part} scale"].values()) == narrow


SLOW = pytest.mark.slow


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("train", "dtype", "launches"),
    [
        (NARROW, "float32", [(1, 0), (2, 3)]),  # DeepSpeed's converter, which the others need, takes its time
        pytest.param(NARROW, "float32", [(2, 2), (1, 0), (2, 3)], marks=SLOW),
        pytest.param(NARROW, "float32", [(2, 3), (1, 1), (2, 1)], marks=SLOW),
        pytest.param(NARROW, "bfloat16", [(2, 1), (3, 3), (1, 2)], marks=SLOW),
        pytest.param(PLAIN, "bfloat16", [(2, 3), (1, 1), (2, 0)], marks=SLOW),
        pytest.param({**NARROW, **PLAIN}, "bfloat16", [(2, 2), (1, 3), (1, 0)], marks=SLOW),
    ],
    ids=str,
)
def test_other_ranks_and_stages_go_on_with_the_same_state(tmp_path, train, dtype, launches):
    trainings = {"moved": [(*each, train) for each in launches], "alone": [(1, 0, train)] * len(launches)}
    moved, alone = launched(tmp_path, dtype, trainings).values()
    for before, after in zip(moved.saved, moved.loaded):
        goes_on(before, after, narrow="optimizer" in train)
    assert moved.losses == pytest.approx(alone.losses, rel=0.02)
    if dtype == "float32":  # an update that took another weight's moments would be wrong by about LR
        for name, weight in alone.saved[1]["weights"].items():
            assert (moved.saved[1]["weights"][name] - weight).abs().mean() < 0.1 * LR, name


FILES, WEIGHTS = {"offload": "nvme", "offload_params": "nvme"}, {"offload_params": "nvme"}


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("train", "launches"),
    [
        (WIDE, [(2, 3, FILES), (2, 3, FILES), (1, 3, WEIGHTS), (2, 2, {})]),
        (WIDE, [(2, 3, {"offload": "nvme"}), (2, 3, {}), (2, 3, WEIGHTS | {"offload": "cpu"}), (1, 0, {})]),
        (WIDE, [(1, 0, {}), (1, 3, {"offload": "nvme"}), (1, 3, {"offload": "nvme"})]),
        (NARROW, [(2, 3, WEIGHTS), (2, 3, WEIGHTS), (1, 1, {}), (1, 3, WEIGHTS)]),
    ],
    ids=str,
)
def test_state_and_weights_in_files_go_on_in_files_or_in_memory(aio, tmp_path, train, launches):
    """Also that a launch like the one before has the same numbers: its files are written anew."""
    settled = [(ranks, stage, train | places) for ranks, stage, places in launches]
    trainings = {"moved": settled, "alone": [(1, 0, train)] * len(launches)}
    moved, alone = launched(tmp_path, "float32", trainings, hidden=768).values()
    for (_, _, places), before, after in zip(launches[1:], moved.saved, moved.loaded):
        goes_on(before, after, narrow="optimizer" in train)
        for kind, key in (("optimizer", "offload"), ("float32params", "offload_params")):
            large = [path for path, size in after["files"].items() if kind in path and size > 1 << 20]
            assert bool(large) == (places.get(key) == "nvme")
    assert moved.losses == pytest.approx(alone.losses, abs=0.02 if "optimizer" in train else 1e-5)
