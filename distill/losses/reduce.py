"""From per-token losses to one number: mask, weight, and divide once by the global number of valid tokens.

The normalizer always comes from the caller, summed over all micro-batches and ranks of one optimizer step. Dividing by
a local count and averaging afterwards would weight a token by how few neighbours it has.

Shape legend: N tokens.
"""

import torch
from torch import Tensor

from distill.errors import DataError

IGNORE_INDEX = -100


def valid_tokens(labels_N: Tensor) -> int:
    """Number of tokens that take part in the loss: the local summand of the global normalizer."""
    return int((labels_N != IGNORE_INDEX).sum())


def token_scale(labels_N: Tensor, weights_N: Tensor | None, normalizer: float, dtype: torch.dtype) -> Tensor:
    """scale_N [N]: what each per-token loss is multiplied by, so that the loss is one plain sum.

    scale_n = w_n / normalizer where the label is not -100, else 0. A normalizer of 0 is right only for a batch without
    a valid token anywhere; its scale is 0.
    Raises DataError when the normalizer is negative, not finite, or 0 beside valid tokens.
    """
    valid_N = labels_N != IGNORE_INDEX
    normalizer = float(normalizer)
    if not 0 <= normalizer < float("inf") or (normalizer == 0 and bool(valid_N.any())):
        raise DataError(
            "the loss normalizer must be the global number of valid tokens",
            where="distill_loss",
            value=normalizer,
            remedy="Sum valid_tokens(labels) over the micro-batches and ranks of the optimizer step.",
        )
    scale_N = valid_N.to(dtype)
    if weights_N is not None:
        scale_N = torch.where(valid_N, weights_N.to(dtype), scale_N)  # a NaN weight of an ignored token stays out
    return scale_N / normalizer if normalizer else scale_N * 0


def reduce_tokens(loss_N: Tensor, labels_N: Tensor, normalizer: float, weights_N: Tensor | None = None) -> Tensor:
    """(1 / normalizer) * sum_n w_n loss_n over the tokens whose label is not -100: a scalar that keeps the graph.

    loss_N: [N] nats. weights_N: [N] or None for 1. Ignored tokens may hold NaN or inf: they reach neither value nor
    gradient.
    """
    scale_N = token_scale(labels_N, weights_N, normalizer, loss_N.dtype)
    return torch.where(labels_N != IGNORE_INDEX, loss_N, 0.0).mul(scale_N).sum()
