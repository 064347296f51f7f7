"""A training with dropout that was stopped goes on with the draws that it would have made."""

import os
import signal

import pytest
from student_world import Folder, settings
from test_checkpoint import equal, exported, log

from distill.store import RunFolder
from distill.tracking import Tracker
from students.train import train_student


class Stopping(Tracker):
    """A tracker that sends this process SIGTERM when step `at` is logged."""

    at = 0

    def log(self, values, step, scope=None):
        super().log(values, step, scope)
        if step == self.at:
            os.kill(os.getpid(), signal.SIGTERM)


def train(world, out, ranks, dropout, stop_at=0):
    config = settings(world / "model", zero_stage=1, adapter={"kind": "lora", "rank": 4, "dropout": dropout})
    run = RunFolder(world, "run", commit="test")
    with Stopping(config, out) as tracker:
        tracker.at = stop_at
        train_student(config, config.students[0], run.stage("traces"), run.stage("logits"), Folder(out), ranks, tracker)


def test_a_stopped_training_with_dropout_ends_in_the_same_bits(world, ranks, tmp_path):
    train(world, tmp_path / "none", ranks, 0.0)
    train(world, tmp_path / "whole", ranks, 0.3)
    with pytest.raises(SystemExit) as end:
        train(world, tmp_path / "again", ranks, 0.3, stop_at=3)
    assert end.value.code == 0 and not (tmp_path / "again" / "model").exists()
    train(world, tmp_path / "again", ranks, 0.3)
    assert log(tmp_path / "again") == log(tmp_path / "whole")
    assert equal(exported(tmp_path / "again"), exported(tmp_path / "whole"))
    assert not equal(exported(tmp_path / "whole"), exported(tmp_path / "none"))
