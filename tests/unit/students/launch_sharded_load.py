"""What ranks hold of a student that is loaded in parts: `launch_sharded_load.py MODEL SMALL OUT`, under a launcher;
SMALL is another, which is loaded before, so that imports are not counted. Rank 0 writes OUT: {"equal": whether the
parts are the file's numbers, "buffers": whether all buffers are as in a whole model, "bytes": [the memory that each
rank's load took at most], "whole_bytes": [what a load of the whole model took]}."""

import ctypes
import json
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parents[3]))  # a launcher starts this file from any folder

from distill.config import Train
from distill.dist import init_ranks
from students.model import load_student
from students.sharded import load_parts

M_MMAP_THRESHOLD = -3


def own_bytes() -> int:
    """Memory of this process, the pages of mapped files that it has read included."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith("VmRSS")))


class Highest(threading.Thread):
    """The most memory that this process had from `with` on, less what it had then."""

    def __enter__(self) -> "Highest":
        self.before = self.most = own_bytes()
        self.over = False
        self.start()
        return self

    def run(self) -> None:
        while not self.over:
            self.most = max(self.most, own_bytes())
            time.sleep(0.001)

    def __exit__(self, *_) -> None:
        self.over = True
        self.join()
        self.most = max(self.most, own_bytes())

    @property
    def grown(self) -> int:
        return self.most - self.before


def main() -> None:
    from deepspeed.runtime.zero import GatheredParameters

    folder, small, out = map(Path, sys.argv[1:])
    torch.set_num_threads(1)
    ranks = init_ranks("cpu", timeout_s=120)
    with suppress(OSError, AttributeError):  # glibc: what is freed leaves the process at once, and is not counted
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 16)
    load_parts(small, torch.float32, Train(zero_stage=3))
    with Highest() as memory:
        model = load_parts(folder, torch.float32, Train(zero_stage=3))
    with Highest() as whole_memory:
        whole, _ = load_student(folder, torch.float32)
        assert all(parameter.isfinite().all() for parameter in whole.parameters())  # reads what is only mapped so far
    wanted = dict(whole.named_parameters())
    equal = wanted.keys() == dict(model.named_parameters()).keys()
    for name, parameter in model.named_parameters():
        with GatheredParameters([parameter]):
            equal &= parameter.shape == wanted[name].shape and torch.equal(parameter, wanted[name])
    buffers = dict(whole.named_buffers())
    same = all(torch.equal(value, buffers[name]) for name, value in model.named_buffers())
    found = ranks.gather((equal, same and model.training, memory.grown, whole_memory.grown))
    if ranks.is_main:
        equal, same, grown, all_grown = zip(*found)
        report = {"equal": all(equal), "buffers": all(same), "bytes": grown, "whole_bytes": all_grown}
        out.write_text(json.dumps(report))
    ranks.close()


if __name__ == "__main__":
    main()
