"""Where a rank's part of each trained weight lies, under any ZeRO stage, and the files with whole ones."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Place:
    """Elements `start` to `start + count` of a whole weight are those from `at` on of `owner`.

    owner: the tensor that the optimizer updates and has a state for, in its `group`: the weight itself or, under ZeRO,
    parts of many weights one after the other.
    """

    owner: torch.Tensor
    group: int
    at: int
    start: int
    count: int

    def of(self, whole: torch.Tensor) -> torch.Tensor:
        """This rank's part, flat, of a tensor that is shaped like the weight or flat and at least as long."""
        return whole.view(-1)[self.start : self.start + self.count]


def places(engine: Any, names: list[str]) -> dict[str, Place]:
    """name -> place, of those trained weights of a DeepSpeed engine of which this rank has a part, in its order.

    names: the trained weights, group by group.
    """
    weights = dict(engine.module.named_parameters())
    stage = engine.zero_optimization_stage()
    if stage == 0:
        groups = [number for number, group in enumerate(engine.optimizer.param_groups) for _ in group["params"]]
        return {name: Place(weights[name], group, 0, 0, weights[name].numel()) for name, group in zip(names, groups)}
    if stage == 3:
        return _places_of_stage_3(engine.optimizer, {id(weights[name]): name for name in names})
    inner, found = engine.optimizer.optimizer, {}
    for name in names:
        if (part := weights[name]._hp_mapping) is not None:
            owner = inner.param_groups[part.param_group_index]["params"][0]
            here, there = part.hp_fragment_address, part.lp_fragment_address
            found[name] = Place(owner, part.param_group_index, here.start, there.start, here.numel)
    return found


def _places_of_stage_3(optimizer: Any, names: dict[int, str]) -> dict[str, Place]:
    """Every weight is cut into as many parts as there are ranks, all of one size; the last ones may be padded."""
    rank, found = dist.get_rank(), {}
    for number, (weights, owner) in enumerate(zip(optimizer.fp16_groups, optimizer.fp32_partitioned_groups_flat)):
        at = 0
        for weight in weights:
            size, group = weight.partition_numel(), optimizer.sub_group_to_group_id[number]
            count = max(0, min(size, weight.ds_numel - rank * size))
            found[names[id(weight)]] = Place(owner, group, at, rank * size, count)
            at += size
    return found


def read_whole(engine: Any, path: Path) -> torch.Tensor:
    """A file of DeepSpeed's universal format, or one like it, on the CPU."""
    content = engine.checkpoint_engine.load(str(path), map_location="cpu")
    return content["param"] if isinstance(content, dict) else content
