"""Launches of trainings, each with ranks and a ZeRO stage of its own: `launch_resharding.py MODEL SETTINGS`.

SETTINGS is JSON: {"trainings": {folder: [[ranks, stage, settings], ...]}, "dtype": }. Launch n of a training goes on at
the checkpoint of the one before for STEPS steps; its rank 0 writes into the folder n-loaded.pt and n-saved.pt (before
and after: "weights", "average", "exp_avg", "exp_avg_sq" by name, and "exp_avg scale", the largest number of each
element's block) and n-losses.json. All processes are forked from this one, which imports everything once.
"""

import json
import os
import socket
import sys
import traceback
from pathlib import Path

import deepspeed  # noqa: F401  (once here instead of in every fork)
import torch
from deepspeed.utils import safe_get_local_optimizer_state
from student_world import settings

from distill.dist import Ranks, init_ranks
from students.checkpoint import Checkpoints
from students.data import Batch
from students.engine import StudentEngine
from students.model import load_student
from students.places import places
from students.sliced_adamw import BLOCK, MOMENTS, widened
from students.step import LossSettings, StudentStep

ROWS, TOKENS, LR, STEPS = 6, 96, 3e-3, 3  # rows for 1, 2 or 3 ranks


def row(step: int, number: int) -> Batch:
    generator = torch.Generator().manual_seed(100 * (step % 2) + number)
    ids, labels = (torch.randint(0, 300, (TOKENS,), generator=generator) for _ in range(2))
    every = torch.arange(TOKENS)
    return Batch(ids, every, [TOKENS], every, labels, None, [])


def state(engine: StudentEngine, ranks: Ranks) -> dict[str, dict[str, torch.Tensor]]:
    """Whole tensors on rank 0. Moments are put together from every rank's part, codes as what they stand for."""
    optimizer, mine = engine._engine.optimizer, {}
    while not isinstance(optimizer, torch.optim.Optimizer):
        optimizer = optimizer.optimizer
    weights = dict(engine.module.named_parameters())
    for name, place in places(engine._engine, engine._trained).items() if optimizer.state else ():
        held = optimizer.state[place.owner]
        for number, part in zip("12", MOMENTS):
            here, scale = slice(place.at, place.at + place.count), None
            if f"codes{number}" in held:
                moment = widened(held)[part][here].clone()
                scale = held[f"scales{number}"].repeat_interleave(BLOCK)[here].clone()
            elif engine.stage == 3:  # it may be in a file
                moment = safe_get_local_optimizer_state(weights[name], part)[: place.count].clone()
            else:
                moment = held[part].view(-1)[here].clone()
            mine[part, name], mine[f"{part} scale", name] = (place.start, moment), (place.start, scale)
    found: dict[str, dict[str, torch.Tensor]] = {}
    for (part, name), pieces in _gathered(ranks, mine if engine.stage > 0 or ranks.is_main else {}).items():
        pieces = [piece for _, piece in sorted(pieces, key=lambda each: each[0]) if piece is not None]
        found.setdefault(part, {})[name] = torch.cat(pieces) if pieces else None
    average, engine._average = engine._average, None
    found["weights"] = dict(engine.whole_weights(torch.float32))
    engine._average = average
    found["average"] = dict(engine.whole_weights(torch.float32)) if average is not None else {}
    found["files"] = {str(path): path.stat().st_size for path in engine._swapped.rglob("*.swp")}
    return found


def _gathered(ranks: Ranks, mine: dict) -> dict:
    together: dict = {}
    for each in ranks.gather(mine):
        for key, piece in each.items():
            together.setdefault(key, []).append(piece)
    return together


def train(model_folder: Path, folder: Path, number: int, dtype: torch.dtype, stage: int, changes: dict) -> None:
    torch.set_num_threads(1)
    ranks = init_ranks("cpu", timeout_s=120)
    model, _ = load_student(model_folder, dtype)
    config = settings(model_folder, zero_stage=stage, **changes).train
    module = StudentStep(model, LossSettings())
    options = {"dtype": dtype, "micro_batches": ROWS // ranks.world, "offload_dir": folder / "offload"}
    engine = StudentEngine(module, config, ranks, **options)
    checkpoints = Checkpoints(folder / "checkpoints", ranks, 9)
    identity = {"zero_stage": engine.stage} | ({"ranks": ranks.world} if engine.stage else {})
    first = (checkpoints.resume(engine, identity) or {"step": 0})["step"]
    if first:
        _save(ranks, folder / f"{number}-loaded.pt", state(engine, ranks))
    losses = []
    for step in range(first, first + STEPS):
        mine = range(ranks.rank, ROWS, ranks.world)
        parts = [engine.accumulate(row(step, i), ROWS * TOKENS, last=i == mine[-1]) for i in mine]
        losses.append(engine.add_up(0.0, torch.stack(parts).sum(0))[0])
        engine.step(LR)
    checkpoints.save(engine, first + STEPS, {"identity": identity})
    checkpoints.wait()
    _save(ranks, folder / f"{number}-saved.pt", state(engine, ranks))
    if ranks.is_main:
        (folder / f"{number}-losses.json").write_text(json.dumps(losses))
    engine.close()
    ranks.close()


def _save(ranks: Ranks, path: Path, value: dict) -> None:
    if ranks.is_main:
        torch.save(value, path)


def launch(world: int, *what) -> bool:
    """Whether `train(*what)` went well on all ranks."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    children = []
    for rank in range(world):
        if pid := os.fork():
            children.append(pid)
            continue
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in place.items()} | {"MASTER_ADDR": "127.0.0.1"})
        status = 1
        try:
            train(*what)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)
    return all([os.waitpid(pid, 0)[1] == 0 for pid in children])


def main() -> None:
    model, asked = Path(sys.argv[1]), json.loads(sys.argv[2])
    dtype = getattr(torch, asked["dtype"])
    for folder, launches in asked["trainings"].items():
        for number, (world, stage, changes) in enumerate(launches):
            if not launch(world, model, Path(folder), number, dtype, stage, changes):
                sys.exit(f"launch {number} of {folder} failed")


if __name__ == "__main__":
    main()
