"""The moving average of a student's weights: average = decay * average + (1 - decay) * weights, after every step.

It lies where the optimizer's state does; of state in files, which is then read once more a step, in host memory.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from students import swapped

# Name and this rank's part of each trained weight: the tensor that is updated itself, until the next is asked for.
Parts = Iterable[tuple[str, torch.Tensor]]


def trained_parts(model: nn.Module, stage: int, *, keep: bool = False) -> Iterator[tuple[str, torch.Tensor]]:
    """This rank's part of each trained weight of a model under DeepSpeed's ZeRO `stage`, as wide as it is kept.

    keep: what is written into a part that lies in a file stays in it.
    """
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if stage == 3:
        yield from _parts_of_stage_3(trained, keep)
        return
    for name, parameter in trained.items():
        if stage == 0:
            yield name, parameter.detach()
        elif parameter._hp_mapping is not None:
            yield name, parameter._hp_mapping.get_hp_fragment().detach()


def _parts_of_stage_3(trained: Mapping[str, nn.Parameter], keep: bool) -> Iterator[tuple[str, torch.Tensor]]:
    optimizer = next(iter(trained.values()))._z3_optimizer
    names = {id(parameter): name for name, parameter in trained.items()}
    for number, (weights, owner) in enumerate(zip(optimizer.fp16_groups, optimizer.fp32_partitioned_groups_flat)):
        with swapped.at_hand(optimizer, number, keep=keep):
            parts = owner.detach().split([weight.partition_numel() for weight in weights])
            yield from ((names[id(weight)], part) for weight, part in zip(weights, parts))


class MovingAverage:
    """The average of the parts that one rank holds, in float32, 4 bytes a weight; it begins at the weights given."""

    def __init__(self, parts: Parts, decay: float):
        self.decay = decay
        self._average = {name: part.float().clone() for name, part in parts}

    def update(self, parts: Parts) -> None:
        """Takes the weights as they are after a step into the average."""
        for name, part in parts:
            self._average[name].lerp_(part.float(), 1 - self.decay)

    @contextmanager
    def in_place_of(self, parts: Callable[[], Parts]) -> Iterator[None]:
        """While this lasts the parts hold the average, rounded to their dtype; afterwards what they held before."""
        held: dict[str, torch.Tensor] = {}
        try:
            for name, part in parts():
                held[name] = part.clone()
                part.copy_(self._average[name])
            yield
        finally:
            for name, part in parts() if held else ():
                part.copy_(held.get(name, part))

    def state(self) -> dict[str, torch.Tensor]:
        return dict(self._average)

    def load(self, state: Mapping[str, torch.Tensor]) -> None:
        """Restores `state`. KeyError or RuntimeError when it is of other weights or parts of them."""
        for name, average in self._average.items():
            average.copy_(state[name])

    def load_flat(self, state: Mapping[str, torch.Tensor]) -> None:
        """Restores flat parts, which may lack what fills up the end of this rank's. KeyError as `load`."""
        for name, average in self._average.items():
            part = state[name]
            average.view(-1)[: part.numel()].copy_(part)
