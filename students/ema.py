"""The moving average of a student's weights: average = decay * average + (1 - decay) * weights, after every step."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

Parts = Mapping[str, torch.Tensor]  # name -> this rank's part of a trained weight, the tensor that is updated itself


def trained_parts(model: nn.Module, stage: int) -> dict[str, torch.Tensor]:
    """This rank's part of each trained weight of a model under DeepSpeed's ZeRO `stage`, as wide as it is kept."""
    from deepspeed.utils import safe_get_local_fp32_param

    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if stage == 0:
        return {name: parameter.detach() for name, parameter in trained.items()}
    if stage == 3:
        return {name: safe_get_local_fp32_param(parameter) for name, parameter in trained.items()}
    mapped = {name: parameter._hp_mapping for name, parameter in trained.items()}
    return {name: mapping.get_hp_fragment() for name, mapping in mapped.items() if mapping is not None}


class MovingAverage:
    """The average of the parts that one rank holds, in float32, 4 bytes a weight; it begins at the weights given."""

    def __init__(self, parts: Parts, decay: float):
        self.decay = decay
        self._average = {name: part.detach().float().clone() for name, part in parts.items()}

    def update(self, parts: Parts) -> None:
        """Takes the weights as they are after a step into the average."""
        for name, average in self._average.items():
            average.lerp_(parts[name].detach().float(), 1 - self.decay)

    @contextmanager
    def in_place_of(self, parts: Parts) -> Iterator[None]:
        """While this lasts the parts hold the average, rounded to their dtype; afterwards what they held before."""
        held = {name: parts[name].detach().clone() for name in self._average}
        try:
            self._fill(parts, self._average)
            yield
        finally:
            self._fill(parts, held)

    def state(self) -> dict[str, torch.Tensor]:
        return dict(self._average)

    def load(self, state: Parts) -> None:
        """Restores `state`. KeyError or RuntimeError when it is of other weights or parts of them."""
        self._fill(self._average, {name: state[name] for name in self._average})

    def load_flat(self, state: Parts) -> None:
        """Restores flat parts, which may lack what fills up the end of this rank's. KeyError as `load`."""
        for name, average in self._average.items():
            part = state[name]
            average.view(-1)[: part.numel()].copy_(part)

    @staticmethod
    def _fill(parts: Parts, values: Parts) -> None:
        with torch.no_grad():
            for name, value in values.items():
                parts[name].copy_(value)
