"""Trains the student of a prepared world in its own process or processes: `launch_training.py WORLD OUT [settings]`."""

import argparse
import json
import os
import signal
import sys
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parents[3]))  # a launcher starts this file from any folder

from student_world import Folder, settings

from distill.config import Config
from distill.dist import add_launcher_arguments, init_ranks
from distill.store import RunFolder
from distill.tracking import Tracker
from students.train import train_student


class Signalling(Tracker):
    """A tracker that sends this process a signal when step `at` is logged."""

    def __init__(self, config: Config, folder: Path, number: int, at: int, is_main: bool):
        super().__init__(config, folder, is_main=is_main)
        self.number, self.at = number, at

    def log(self, values, step, scope=None):
        super().log(values, step, scope)
        if step == self.at:
            os.kill(os.getpid(), self.number)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("world", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--train", type=json.loads, default=[{}], help="a list of changes, one training each")
    parser.add_argument("--kind", default="logits")
    parser.add_argument("--kill-at", type=int, default=0)
    parser.add_argument("--terminate-at", type=int, default=0)
    add_launcher_arguments(parser)
    args = parser.parse_args()
    torch.set_num_threads(1)
    ranks = init_ranks("cpu", timeout_s=120)
    run = RunFolder(args.world, "run", commit="test", rank=ranks.rank)
    number, at = (signal.SIGKILL, args.kill_at) if args.kill_at else (signal.SIGTERM, args.terminate_at)
    for i, changes in enumerate(args.train):
        folder = Folder(args.out / str(i) if len(args.train) > 1 else args.out)
        config = settings(args.world / "model", args.kind, **changes)
        with Signalling(config, folder.path, number, at, ranks.is_main) as tracker:
            stages = run.stage("traces"), run.stage("logits"), folder
            train_student(config, config.students[0], *stages, ranks, tracker)
    ranks.close()


if __name__ == "__main__":
    main()
