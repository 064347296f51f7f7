"""What ends a training in the middle of a library, in words: too little memory, another rank gone."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from distill.config import Train
from distill.dist import Ranks
from distill.errors import CapacityError, DistillError

# gloo raises a RuntimeError without a class of its own.
LOST = ("gloo", "Connection closed by peer", "Connection reset by peer")


@contextmanager
def in_words(student: str, train: Train, ranks: Ranks) -> Iterator[None]:
    """CapacityError in place of memory that cannot be had, DistillError in place of a lost rank; others as they are."""
    where = f"student {student}, rank {ranks.rank} of {ranks.world}"
    try:
        yield
    except RuntimeError as error:
        told = str(error).partition("\n")[0]
        if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in told:
            remedy = f"{_more_room(train, ranks)} None of it changes what is learned: run again to go on."
            raise CapacityError(f"there is too little memory: {told}", where=where, remedy=remedy) from error
        if isinstance(error, torch.distributed.DistError) or any(each in told for each in LOST):
            remedy = "Read the first error of another rank in the log above, then run again to go on."
            lost = DistillError(f"another rank stopped or hangs: {told.partition('. ')[0]}", where=where, remedy=remedy)
            lost.own = False  # all that are left see it, and one of them telling it is enough
            raise lost from error
        raise


def _more_room(train: Train, ranks: Ranks) -> str:
    """The settings that need less memory than those of `train` and were not taken yet, the cheapest first."""
    smaller = {
        f"train.micro_batch_tokens={train.max_seq_tokens}": train.micro_batch_tokens >= 2 * train.max_seq_tokens,
        "train.activation_checkpointing=true": not train.activation_checkpointing,
        "train.kept_activations=attention": train.activation_checkpointing and train.kept_activations == "products",
        "train.zero_stage=3": ranks.world > 1 and train.zero_stage < 3,
        "train.mlp_tiles=4": train.mlp_tiles == 1,
        "train.activation_offload=true": not train.activation_offload,
    }
    names = [name for name, helps in smaller.items() if helps] or ["train.offload=cpu"]
    return f"Set {', '.join(names)}, as many as it takes."
