"""fp32 linear layers and experts on a CPU through oneDNN, their weights packed once for a whole sampling session.

torch hands fp32 matrix products to MKL, which leaves AVX-512 unused on processors of other makers; oneDNN does not. On
an AMD EPYC (Zen 5) that is 105 against 245 GFLOP/s a core, at the same precision. Packing copies the weights, so it
serves frozen weights for the time of a session, and models that fit twice.

Shape legend: T tokens, K experts a token, E hidden size.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

EXPERTS = "distill_packed"
LARGEST_BYTES = 4 << 30  # larger models would not gain enough for holding their weights twice
SMALLEST_ROWS = 24  # below, a oneDNN call costs more than it saves
PACKED_ROWS = 256  # the number of rows that the packed layout is made for; others run on it nearly as fast


def pack(model: nn.Module) -> Callable[[], None]:
    """Packs every fp32 linear layer and expert of a CPU model in place; gives the function that undoes it.

    Packed weights are used under torch.inference_mode only, and stay what they were when packed. Does nothing on other
    devices, in other dtypes, and to models beyond LARGEST_BYTES.
    """
    weights = list(model.parameters())
    fits = sum(weight.nbytes for weight in weights) <= LARGEST_BYTES
    if not (fits and torch.backends.mkldnn.is_available() and all(_is_plain(weight) for weight in weights)):
        return lambda: None
    linears = [module for module in model.modules() if type(module) is nn.Linear]
    experts = [
        module for module in model.modules() if hasattr(module, "gate_up_proj") and hasattr(module, "num_experts")
    ]
    for linear in linears:
        linear.forward = partial(_linear, linear.weight, _packed(linear.weight), linear.bias)
    for module in experts:
        module.packed = [_packed(up) for up in module.gate_up_proj], [_packed(down) for down in module.down_proj]
    before = getattr(model.config, "_experts_implementation", None)
    if experts:
        model.config._experts_implementation = EXPERTS

    def undo() -> None:
        for linear in linears:
            del linear.forward
        for module in experts:
            del module.packed
        if experts:
            model.config._experts_implementation = before

    return undo


def _is_plain(weight: Tensor) -> bool:
    return weight.device.type == "cpu" and weight.dtype == torch.float32 and type(weight) is nn.Parameter


@torch.inference_mode()
def _packed(weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach(), PACKED_ROWS)


def _linear(weight: Tensor, packed: Tensor, bias: Tensor | None, inputs: Tensor) -> Tensor:
    if inputs.numel() < SMALLEST_ROWS * inputs.shape[-1] or not torch.is_inference_mode_enabled():
        return F.linear(inputs, weight, bias)
    return torch.ops.mkldnn._linear_pointwise(inputs, packed, bias, "none", [], "")


def _grouped(inputs: Tensor, weights: Tensor, packed: list[Tensor], counts: list[int]) -> Tensor:
    parts = zip(weights.unbind(), packed, inputs.split(counts))
    return torch.cat([_linear(weight, layout, None, part) for weight, layout, part in parts if len(part)])


def packed_experts(experts: nn.Module, hidden_TE: Tensor, expert_TK: Tensor, weight_TK: Tensor) -> Tensor:
    """[T, E]: each token through its K experts, weighted and summed; tokens are sorted by expert first."""
    tokens, active = expert_TK.shape
    flat_X = expert_TK.reshape(-1)
    order_X = flat_X.argsort(stable=True)
    counts = torch.bincount(flat_X, minlength=experts.num_experts).tolist()
    up, down = experts.packed
    up_XF = _grouped(hidden_TE[order_X // active], experts.gate_up_proj, up, counts)
    down_XE = _grouped(experts._apply_gate(up_XF), experts.down_proj, down, counts)
    down_XE *= weight_TK.reshape(-1)[order_X].unsqueeze(-1)
    in_order_XE = torch.empty_like(down_XE)
    in_order_XE[order_X] = down_XE
    return in_order_XE.view(tokens, active, -1).sum(1)


ALL_EXPERTS_FUNCTIONS.register(EXPERTS, packed_experts)
