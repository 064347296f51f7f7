"""The learning rate of each step."""

import math

from distill.config import Train


def learning_rate(step: int, steps: int, train: Train) -> float:
    """The rate of step 0 .. steps - 1: linear up to lr over the warm-up, whose last step has it; then by the schedule
    down to lr * min_lr_ratio, which the last step has."""
    warmup = math.ceil(train.warmup_ratio * steps)
    if step < warmup:
        return train.lr * (step + 1) / warmup
    share = (step - warmup + 1) / (steps - warmup)
    height = {"cosine": (1 + math.cos(math.pi * share)) / 2, "linear": 1 - share, "constant": 1.0}[train.schedule]
    return train.lr * (train.min_lr_ratio + (1 - train.min_lr_ratio) * height)
