"""ZeRO-3 with weights or optimizer state in files (NVMe): how DeepSpeed is told to, and checkpoints of it.

What DeepSpeed 0.19 does by itself with weights in files fails: it reads a float32 model's as bfloat16 where there is no
fp16, asks for the same weight twice when it reads ahead, keeps a buffer for each weight that it will soon use again,
and makes every buffer as large as the embedding. Here the width is told, a layer's weights are read when the layer
runs and dropped after it, and weights larger than any of a layer's (embedding and head) stay in host memory.

Its checkpoints of files lose the count of steps and all that is too small for a file. Here a checkpoint has one file
for each rank, group of weights and part of the state, written at once: host memory need not hold more than one. Moments
of 8 bits, which are never in files themselves, are written as the float32 numbers that they stand for.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from distill.files import read_json, sync, write_json
from students.places import Place, places, read_whole
from students.sliced_adamw import MOMENTS, SlicedAdamW, widened

PARTS = ("fp32", *MOMENTS)
INDEX = "swapped_rank_{:05d}.json"  # {"steps": , "places": {name: [group, at, count]}}
REMEDY = "Delete this checkpoint."
SPARE = 2  # buffers beside those of one layer


def settle(model: nn.Module, zero: dict) -> None:
    """Adds to DeepSpeed's ZeRO section, with offload_param on nvme, what it needs for the weights of `model`, which may
    be on any device."""
    sizes = [[getattr(p, "ds_numel", p.numel()) for p in layer.parameters()] for layer in model.base_model.layers]
    zero["offload_param"] |= {
        "buffer_count": max(map(len, sizes)) + SPARE,
        "buffer_size": -(-max(map(max, sizes)) // dist.get_world_size()),
        "max_in_cpu": 0,
    }
    zero |= {"stage3_prefetch_bucket_size": 0, "stage3_max_reuse_distance": 0}


def initializer(settings: dict, dtype: torch.dtype, **module: nn.Module) -> Any:
    """DeepSpeed's zero.Init, as a context or at once on `module`, which puts this rank's part of weights into files.

    settings: DeepSpeed's, with a ZeRO section that `settle` has seen.
    """
    from deepspeed.runtime.config import DeepSpeedConfig
    from deepspeed.runtime.swap_tensor.partitioned_param_swapper import AsyncPartitionedParameterSwapper
    from deepspeed.runtime.zero.partition_parameters import DeepSpeedTensorOverride, Init

    class LayerSwapper(AsyncPartitionedParameterSwapper):
        def swappable_tensor(self, param: Any = None, numel: int | None = None) -> bool:
            size = numel if param is None else param.ds_tensor.ds_numel
            return size <= self.elements_per_buffer and super().swappable_tensor(param=param, numel=numel)

    return Init(
        config_dict_or_path=settings,
        remote_device="nvme",
        pin_memory=True,
        param_swapper=LayerSwapper(DeepSpeedConfig(settings), dtype),
        tensor_overrides=[DeepSpeedTensorOverride.device],  # buffers keep their own dtype
        **module,
    )


@contextmanager
def in_memory(parameter: nn.Parameter) -> Iterator[None]:
    """While this lasts this rank's part of a divided weight is in memory; what is written into it stays in its file."""
    from deepspeed.runtime.swap_tensor.partitioned_param_swapper import PartitionedParamStatus

    swapper, part = parameter.nvme_swapper, parameter.ds_tensor
    away = part.status == PartitionedParamStatus.NOT_AVAILABLE
    if away:
        swapper.swap_in([parameter], async_op=False)
    yield
    if away:
        swapper.swap_out_and_release([parameter])


def in_files(engine: Any) -> bool:
    """Whether a DeepSpeed engine keeps weights or optimizer state in files."""
    optimizer = engine.optimizer
    return getattr(optimizer, "swap_optimizer", False) or getattr(optimizer, "params_in_nvme_and_cpu", False)


def save(engine: Any, names: list[str], folder: Path) -> None:
    """Writes this rank's part of the trained weights `names` and their optimizer state as they are now, synced."""
    optimizer, rank = engine.optimizer, dist.get_rank()
    folder.mkdir(parents=True, exist_ok=True)
    steps = 0
    for number, owner in enumerate(optimizer.fp32_partitioned_groups_flat):
        with at_hand(optimizer, number, keep=False):
            state = _with_wide_moments(optimizer.optimizer.state[owner])
            steps = int(state["step"])
            for part in PARTS:
                tensor = owner.detach() if part == "fp32" else state[part]
                write({part: tensor.to("cpu", copy=True)}, folder / _file(part, number, rank))
    found = {name: (_number(optimizer, p.owner), p.at, p.count) for name, p in places(engine, names).items()}
    write_json(folder / INDEX.format(rank), {"steps": steps, "places": found})


def write(tensors: dict[str, torch.Tensor], path: Path) -> None:
    save_file(tensors, path)
    sync(path)


def is_written(folder: Path) -> bool:
    """Whether a checkpoint is one of `save`."""
    return (folder / INDEX.format(0)).exists()


def convert(source: Path, target: Path) -> None:
    """Makes of what all ranks wrote whole flat tensors, zero/NAME/{fp32,exp_avg,exp_avg_sq}.pt. For one rank alone."""
    indices = [read_json(path, REMEDY)["places"] for path in sorted(source.glob("swapped_rank_*.json"))]
    for name in indices[0]:
        folder = target / "zero" / name
        folder.mkdir(parents=True)
        for part in PARTS:
            pieces = []
            for rank, (number, at, count) in enumerate(index[name] for index in indices):
                with safe_open(source / _file(part, number, rank), "pt") as file:
                    pieces.append(file.get_slice(part)[at : at + count])
            torch.save({"param": torch.cat(pieces)}, folder / f"{part}.pt")


def load(engine: Any, folder: Path) -> int:
    """Restores what `save` wrote with the same ranks; the number of steps done."""
    rank = dist.get_rank()
    steps = read_json(folder / INDEX.format(rank), REMEDY)["steps"]
    _restore(engine.optimizer, lambda number, part: load_file(folder / _file(part, number, rank))[part], steps)
    return steps


def load_converted(engine: Any, names: list[str], folder: Path) -> None:
    """Restores whole tensors, zero/NAME/{fp32,exp_avg,exp_avg_sq}.pt, of which this rank takes its part; not moments of
    8 bits."""
    groups: dict[int, list[tuple[str, Place]]] = {}
    for name, place in places(engine, names).items():
        groups.setdefault(_number(engine.optimizer, place.owner), []).append((name, place))

    def read(number: int, part: str) -> torch.Tensor:
        flat = torch.zeros(engine.optimizer.fp16_partitioned_groups_flat_numel[number])
        for name, place in groups[number]:
            whole = read_whole(engine, folder / "zero" / name / f"{part}.pt")
            flat[place.at : place.at + place.count] = place.of(whole)
        return flat

    _restore(engine.optimizer, read)


def _restore(optimizer: Any, read: Callable[[int, str], torch.Tensor], steps: int | None = None) -> None:
    """steps: after how many moments of 8 bits are those that are read; None leaves these out."""
    optimizer._partition_all_parameters()
    inner = optimizer.optimizer
    for number, owner in enumerate(optimizer.fp32_partitioned_groups_flat):
        with at_hand(optimizer, number, keep=True):
            owner.data.copy_(read(number, "fp32"))
            if not isinstance(inner, SlicedAdamW):
                state = inner.state[owner]
                for part in MOMENTS:
                    state[part] = state.get(part, torch.empty_like(owner.data)).copy_(read(number, part))
            elif steps is not None:
                group = inner.param_groups[optimizer.sub_group_to_group_id[number]]
                inner.set_moments(owner, group, steps, [read(number, part) for part in MOMENTS])
            optimizer._reassign_or_swap_out_partitioned_parameters(number)
    if kept := optimizer.persistent_parameters:
        kept[0].partition(kept)
    optimizer.checkpoint_event_epilogue()


@contextmanager
def at_hand(optimizer: Any, number: int, *, keep: bool) -> Iterator[None]:
    """While this lasts master weights and state of a group are in memory; keep: what is changed in them stays."""
    in_files = optimizer._swappable_optimizer_subgroup(number)
    if in_files:
        optimizer._optimizer_states_and_gradient_swap_in(number)
    yield
    if in_files and keep:
        optimizer._optimizer_states_and_gradient_swap_out(number)
    elif in_files:
        optimizer._release_swap_buffers(number)


def _with_wide_moments(state: dict) -> dict:
    """A device that keeps codes may have no room for what they stand for."""
    if not any(name.startswith("codes") for name in state):
        return state
    return widened({name: value.cpu() if torch.is_tensor(value) else value for name, value in state.items()})


def _number(optimizer: Any, owner: torch.Tensor) -> int:
    return next(i for i, each in enumerate(optimizer.fp32_partitioned_groups_flat) if each is owner)


def _file(part: str, number: int, rank: int) -> str:
    return f"{part}_group_{number:05d}_rank_{rank:05d}.safetensors"
