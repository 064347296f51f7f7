"""Ranks that share experts make the same number of forward passes.

In every layer a rank sends its tokens to the ranks that hold their experts and waits for the answers, so a forward pass
is an exchange in which all ranks of the copy take part. They need not do the same thing in it: one may prefill while
another decodes, with other shapes. A rank that has run out of rows goes on with a dummy row until all have.

Before each pass the ranks of the copy add up how many have work. Those that have need not look at the sum; those that
have none read it: zero means that all are done, at the same pass.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from distill.slots import SlotModel
from distill.split import Split


class Lockstep:
    """The forward passes of one copy of a model. Made by all ranks of the run at the same time."""

    def __init__(self, split: Split, device: torch.device):
        for block in split.blocks:
            group = dist.new_group(list(block))
            if split.rank in block:
                self.group = group
        self.at_work = torch.zeros(1, dtype=torch.int32, device=device)

    def step(self) -> None:
        """Called before every forward pass that has work."""
        self.at_work.fill_(1)
        dist.all_reduce(self.at_work, group=self.group)

    def finish(self, dummy: Callable[[], object]) -> None:
        """Takes part in the others' passes with `dummy` until no rank has work. Called by every rank."""
        while self._others_work():
            dummy()

    def _others_work(self) -> bool:
        self.at_work.fill_(0)
        dist.all_reduce(self.at_work, group=self.group)
        return bool(self.at_work)


class LockstepModel(SlotModel):
    """A SlotModel whose forward passes are taken together with the other ranks of its copy."""

    def __init__(self, lockstep: Lockstep, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.lockstep = lockstep
        self.dummy_11 = torch.zeros(1, 1, dtype=torch.int64, device=self.device)

    def prefill(self, *args) -> Tensor:
        self.lockstep.step()
        return super().prefill(*args)

    def decode(self, *args) -> Tensor:
        self.lockstep.step()
        return super().decode(*args)

    def hidden(self, ids_BP: Tensor) -> Tensor:
        self.lockstep.step()
        return super().hidden(ids_BP)

    @contextmanager
    def session(self, slots: int = 0) -> Iterator[None]:
        """As SlotModel's, and every rank of the copy opens one: it closes when all ranks have come to its end."""
        inner = self.cache is not None
        with super().session(slots):
            yield
            if not inner:  # not after an error or an abandoned sample(): the others end by the lost connection
                self.finish()

    def finish(self) -> None:
        """Returns when no rank of the copy has work. Called by all of them."""
        self.lockstep.finish(lambda: SlotModel.hidden(self, self.dummy_11))
