"""Which rank this process is, and the few things ranks do together outside DeepSpeed's engine.

Started by `deepspeed` or `torchrun`, a process reads its place from the environment; started by plain python it is the
only rank and needs neither a launcher nor an agreed port. torch and DeepSpeed are imported by init_ranks, not before.
"""

from __future__ import annotations

import logging
import os
import pickle
import sys
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from distill.errors import CapacityError, ConfigError, DistillError

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
TIMEOUT_S = 3600.0  # rank 0 may grade or write a large checkpoint while the others wait


@dataclass(frozen=True)
class Ranks:
    """This process (`rank` of `world`, `local_rank` on its machine, its `device`) and its links to the others.

    Every method but print must be called by all ranks. A rank that is lost raises DistillError on those that wait.
    """

    rank: int
    world: int
    local_rank: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print on rank 0 only, at once."""
        if self.is_main:
            print(*args, **{"flush": True, **kwargs})

    def barrier(self) -> None:
        """Wait for all ranks."""
        import torch.distributed as dist

        with self._naming("a barrier"):
            if dist.get_backend() == "gloo":
                dist.monitored_barrier(wait_all_ranks=True)  # names the ranks that did not come
            else:
                dist.barrier(device_ids=[self.device.index])

    def gather(self, value: T) -> list[T]:
        """The values of all ranks, in rank order, on every rank. Any picklable value."""
        import torch.distributed as dist

        values: list[Any] = [None] * self.world
        with self._naming("a gather"):
            dist.all_gather_object(values, value)
        return values

    def broadcast(self, value: T) -> T:
        """Rank 0's value, on every rank. Any picklable value."""
        import torch.distributed as dist

        box = [value]
        with self._naming("a broadcast"):
            dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def on_main(self, work: Callable[[], T]) -> T:
        """The result of work(), run on rank 0, on every rank (picklable); an error there is raised on every rank."""
        if self.world == 1:
            return work()
        result, failure = None, None
        if self.is_main:
            try:
                result = work()
                pickle.dumps(result)  # failing to send it later would leave the others waiting
            except Exception as error:
                result, failure = None, error
        # A DistillError travels as it is, so that every rank ends with the same exit code; others may not pickle.
        told = (
            failure
            if failure is None or isinstance(failure, DistillError)
            else DistillError(f"rank 0 failed: {type(failure).__name__}: {failure}")
        )
        result, told = self.broadcast((result, told))
        if told is not None:
            raise failure or told
        return result

    def share(self, items: Sequence[T], work: Callable[[T], Any]) -> None:
        """work(item) for every item, each rank a share of them; a DistillError of one rank is raised on every rank."""
        failure = None
        try:
            for item in items[self.rank :: self.world]:
                work(item)
        except DistillError as error:
            failure = error
        if failed := [each for each in self.gather(failure) if each is not None]:
            raise failed[0]

    def main_first(self, work: Callable[[], None]) -> None:
        """work() on rank 0, then on every other rank."""
        self.on_main(work)
        if not self.is_main:
            work()

    def require_same(self, value: Any, what: str) -> None:
        """Returns if `value` is equal on all ranks; else raises ConfigError naming `what` and the ranks that differ."""
        values = self.gather(value)
        others = [rank for rank, other in enumerate(values) if other != values[0]]
        if others:
            raise ConfigError(
                f"{what} differs between ranks: rank 0 has {values[0]!r}, rank {others[0]} has {values[others[0]]!r}",
                value=f"ranks {others}",
                remedy="Give every node the same files, arguments and environment.",
            )

    def close(self) -> None:
        """Leave the process group. Not a barrier."""
        import torch.distributed as dist

        if dist.is_initialized():
            dist.destroy_process_group()

    @contextmanager
    def _naming(self, what: str):
        try:
            yield
        except RuntimeError as error:
            raise DistillError(
                f"{what} failed: {str(error).splitlines()[0]}",
                where=f"rank {self.rank} of {self.world}",
                remedy="Another rank stopped or hangs: read the first error in the log above, then run again.",
            ) from error


def init_ranks(device: str = "auto", timeout_s: float = TIMEOUT_S) -> Ranks:
    """The ranks of this run, joined through DeepSpeed: NCCL on GPUs, gloo on CPU. A second call joins nothing anew.

    device: "auto" (a GPU if there is one), "cpu" or "cuda". timeout_s: how long a rank waits for another.
    Errors: CapacityError when a GPU is asked for and this machine has none, or fewer than local ranks; ConfigError when
    the environment names a place that cannot be (rank outside world, world without a master address).
    """
    rank, world, local_rank = _place()
    place = _device(device, local_rank)
    _quiet_deepspeed(place.type)

    import deepspeed
    import torch
    import torch.distributed as dist

    backend = "nccl" if place.type == "cuda" else "gloo"
    timeout = timedelta(seconds=timeout_s)
    if place.type == "cuda":
        torch.cuda.set_device(place)
    if world == 1 and not dist.is_initialized():
        # DeepSpeed wants a process group even for one rank; a store in this process needs no port.
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    try:
        deepspeed.init_distributed(backend, auto_mpi_discovery=False, timeout=timeout, verbose=False)
    except (RuntimeError, ValueError) as error:
        raise DistillError(
            f"the ranks could not join: {str(error).splitlines()[0]}",
            where=f"rank {rank} of {world} at {os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}",
            remedy="Check that every node can reach this address and that no other job uses the port (--master_port).",
        ) from error
    if (dist.get_rank(), dist.get_world_size()) != (rank, world):
        raise ConfigError(
            f"the process group says {dist.get_rank()} of {dist.get_world_size()}, the environment {rank} of {world}",
            where="rank",
            remedy="Start through one launcher only.",
        )
    return Ranks(rank, world, local_rank, place)


def add_launcher_arguments(parser) -> None:
    """Accept what the DeepSpeed launcher appends. The value is not used: the same number stands in LOCAL_RANK."""
    import argparse

    parser.add_argument("--local_rank", "--local-rank", type=int, default=None, help=argparse.SUPPRESS)


def _place() -> tuple[int, int, int]:
    """(rank, world, local_rank) from the environment, completed there for one rank: DeepSpeed reads it again."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    found = {name: os.environ[name] for name in names if name in os.environ}
    if "RANK" not in found and found.get("WORLD_SIZE", "1") == "1":
        found = dict.fromkeys(names, "0") | {"WORLD_SIZE": "1"}
    try:
        rank, world, local_rank = (int(found[name]) for name in names)
    except (KeyError, ValueError):
        raise ConfigError(
            f"a launcher must set all of {', '.join(names)} to whole numbers",
            where="environment",
            value=found,
            remedy="Start with `deepspeed distill/run.py ...`, or unset them to run one rank.",
        ) from None
    if not (0 <= rank < world and 0 <= local_rank <= rank):
        raise ConfigError("rank, world size and local rank contradict each other", where="environment", value=found)
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if world > 1 and not os.environ.get(name)]
    if missing:
        raise ConfigError(
            f"WORLD_SIZE is {world} but {' and '.join(missing)} not set",
            where="environment",
            remedy="Start with `deepspeed distill/run.py ...`, or unset WORLD_SIZE to run one rank.",
        )
    os.environ.update(found)
    return rank, world, local_rank


def _device(name: str, local_rank: int) -> torch.device:
    import torch

    if name not in ("auto", "cpu", "cuda"):
        raise ConfigError("unknown device", where="hardware.device", value=name, remedy="Use auto, cpu or cuda.")
    count = torch.cuda.device_count() if name != "cpu" and torch.cuda.is_available() else 0
    if name == "cpu" or (name == "auto" and count == 0):
        return torch.device("cpu")
    if local_rank >= count:
        raise CapacityError(
            f"a GPU is asked for but this machine has {count} that can be used"
            if count == 0
            else f"local rank {local_rank} has no GPU: this machine has {count}",
            where="hardware.device",
            value=name,
            remedy="Set hardware.device: cpu, or check the driver, CUDA_VISIBLE_DEVICES and a CUDA build of torch."
            if count == 0
            else f"Start at most {count} ranks on a node (--num_gpus {count}).",
        )
    return torch.device("cuda", local_rank)


def _quiet_deepspeed(device_type: str) -> None:
    """Choose DeepSpeed's accelerator before its first import, and spare CPU runs a two-minute compilation."""
    if "deepspeed" not in sys.modules:
        os.environ["DS_ACCELERATOR"] = device_type
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    import deepspeed.ops

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)  # the import sets it to INFO
    if device_type == "cpu":
        # The shared-memory all-reduce is compiled at start; gloo does the same sum without it.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
