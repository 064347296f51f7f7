"""How a student's decoder layers run: compiled or not, what they keep for the backward pass, and where.

Compiled, norms, rotations, activations and residual additions join into few kernels, and what the backward pass needs
is chosen by the compiler; what a layer computes stays the same up to rounding. Recomputed, a layer keeps its input and
the output of its attention, which is the one product that is long to recompute and short to keep; or the outputs of all
its matrix products, so that only what is cheap is computed twice.

Shape legend: B rows (one), N tokens, H hidden size.
"""

from collections.abc import Callable
from functools import cache, partial

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from distill.config import Train

RECOMPILES = 64  # a packed row of another length asks for one or two, after which lengths are symbols
LEAST_BYTES = 1 << 22  # of a tensor that is worth the way to host memory and back
ATTENTION = ("_scaled_dot_product", "_varlen_attn")


def prepare_layers(model: nn.Module, train: Train, device: torch.device) -> None:
    """Makes every decoder layer of a transformers model run as `train` says; call before DeepSpeed sees it."""
    compiled = train.compile == "on" or (train.compile == "auto" and device.type == "cuda")
    if compiled:
        torch._dynamo.config.cache_size_limit = max(torch._dynamo.config.cache_size_limit, RECOMPILES)
    host = HostActivations() if train.activation_offload and device.type == "cuda" else None
    for layer in model.base_model.layers:
        if train.mlp_tiles > 1:
            layer.mlp.__class__ = _tiled(type(layer.mlp), train.mlp_tiles)  # its parameters keep their names
        forward = layer.forward
        if train.activation_checkpointing:
            forward = partial(checkpoint, forward, use_reentrant=False, context_fn=CONTEXTS[train.kept_activations])
        if compiled:
            forward = torch.compile(forward)
        layer.forward = host.around(forward) if host else forward


def gather_whole_layers(model: nn.Module) -> int:
    """Parameters of the largest decoder layer, each of which ZeRO-3 gathers and frees as a whole from now on.

    Its hooks around every submodule would break a compiled layer into pieces too small to compile.
    """
    from deepspeed.utils import set_z3_leaf_module

    layers = model.base_model.layers
    for layer in layers:
        set_z3_leaf_module(layer, True)
    return max(sum(getattr(p, "ds_numel", p.numel()) for p in layer.parameters()) for layer in layers)


class HostActivations:
    """Large tensors that a layer keeps for its backward pass wait for it in pinned host memory.

    They leave on a stream of their own while later layers compute, and come back when their layer asks for them.
    """

    def __init__(self):
        self._leaving = torch.cuda.Stream()

    def around(self, forward: Callable) -> Callable:
        def run(*args, **kwargs):
            with saved_tensors_hooks(self._keep, self._give_back):
                return forward(*args, **kwargs)

        return run

    def _keep(self, tensor: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, torch.device]:
        if not tensor.is_cuda or isinstance(tensor, nn.Parameter) or tensor.nbytes < LEAST_BYTES:
            return tensor
        self._leaving.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._leaving):
            host = torch.empty_like(tensor, device="cpu", pin_memory=True)
            host.copy_(tensor, non_blocking=True)
        tensor.record_stream(self._leaving)
        return host, tensor.device

    def _give_back(self, kept: torch.Tensor | tuple[torch.Tensor, torch.device]) -> torch.Tensor:
        if isinstance(kept, torch.Tensor):
            return kept
        host, device = kept
        torch.cuda.current_stream().wait_stream(self._leaving)
        return host.to(device, non_blocking=True)


@cache
def _tiled(kind: type[nn.Module], tiles: int) -> type[nn.Module]:
    """That module of single tokens, taking a row in `tiles` parts; of its inner tensors one part's exist at a time."""

    class Tiled(kind):
        def forward(self, hidden_BNH: torch.Tensor) -> torch.Tensor:
            whole = partial(kind.forward, self)
            return torch.cat([checkpoint(whole, part, use_reentrant=False) for part in hidden_BNH.chunk(tiles, 1)], 1)

    return Tiled


def _policy(names: tuple[str, ...], context, operation, *args, **kwargs) -> CheckpointPolicy:
    kept = any(name in str(operation) for name in names)
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def _contexts(names: tuple[str, ...]):
    return create_selective_checkpoint_contexts(partial(_policy, names))


# One function of each kind: compiled layers are told apart by it.
CONTEXTS = {"attention": partial(_contexts, ATTENTION), "products": partial(_contexts, (*ATTENTION, "aten.mm"))}
