"""How a student's decoder layers run: compiled, and recomputed in the backward pass or not.

Compiled, norms, rotations, activations and residual additions join into few kernels, and what the backward pass needs
is chosen by the compiler; what a layer computes stays the same up to rounding. Recomputed, a layer keeps its input and
the output of its attention, which is the one product that is long to recompute and short to keep.
"""

from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

RECOMPILES = 64  # a packed row of another length asks for one or two, after which lengths are symbols
_KEPT = ("_scaled_dot_product", "_varlen_attn")


def prepare_layers(model: nn.Module, *, compiled: bool, recomputed: bool) -> None:
    """Makes every decoder layer of a transformers model compiled and/or recomputed; call before DeepSpeed sees it."""
    if compiled:
        torch._dynamo.config.cache_size_limit = max(torch._dynamo.config.cache_size_limit, RECOMPILES)
    for layer in model.base_model.layers:
        forward = layer.forward
        if recomputed:
            forward = partial(checkpoint, forward, use_reentrant=False, context_fn=_contexts)
        if compiled:
            forward = torch.compile(forward)
        layer.forward = forward


def _contexts():
    return create_selective_checkpoint_contexts(_policy)


def _policy(context, operation, *args, **kwargs) -> CheckpointPolicy:
    kept = any(name in str(operation) for name in _KEPT)
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE
