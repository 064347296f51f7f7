"""A frozen linear layer in 4 bits."""

from typing import Self

import torch
from bitsandbytes.nn import Linear4bit, Params4bit
from torch import nn

from distill.errors import ModelError

BLOCK = 64  # weights that share a scale


class FrozenLinear4bit(Linear4bit):
    """NF4 weights in blocks of 64 whose scales have 8 bits each: 4.13 bits a weight.

    Not part of state_dict(): it is made again from the base model. On a CPU bitsandbytes would repack the weight at the
    first evaluation, in place, into a form that its own dequantization misreads afterwards; that is off here.
    """

    @classmethod
    def of(cls, linear: nn.Linear, dtype: torch.dtype, device: torch.device) -> Self:
        """The layer with the weights of `linear` on `device`; products are computed in `dtype`.

        ModelError on a CPU when a block would reach into the next row: bitsandbytes misreads it there.
        """
        if device.type == "cpu" and linear.in_features % BLOCK:
            raise ModelError(
                f"on a CPU 4-bit weights need inputs in multiples of {BLOCK}",
                where="students.N.adapter.kind qlora",
                value=linear.in_features,
                remedy="Use kind: lora, or a GPU.",
            )
        bias = linear.bias is not None
        layer = cls(linear.in_features, linear.out_features, bias, dtype, quant_type="nf4", device="meta")
        layer.support_avx512bf16_for_cpu = False
        if bias:
            layer.bias = nn.Parameter(linear.bias.detach().to(device), requires_grad=False)
        weight = Params4bit(linear.weight.detach(), module=layer, blocksize=BLOCK, quant_type="nf4")
        layer.weight = weight.to(device)
        layer.training = linear.training
        return layer

    def _save_to_state_dict(self, destination, prefix, keep_vars) -> None:
        pass
