"""Low-rank adapters on a frozen student, the frozen weights as they are (LoRA) or in 4 bits (QLoRA).

A target computes W x + (alpha / rank) B A x. Only A and B are trained and kept in checkpoints; the exported student has
W + (alpha / rank) B A in W's place, for QLoRA with the W that the 4 bits stand for, since that is the one it learned
around. peft puts A and B in place, bitsandbytes holds the 4 bits (NF4, blocks of 64 with scales of 8 bits).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from distill.config_students import Adapter
from distill.errors import CapacityError

NAME = "default"  # peft's for an adapter without one
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def attach(
    model: PreTrainedModel, adapter: Adapter, dtype: torch.dtype, device: torch.device, seed: int
) -> PreTrainedModel:
    """`model` itself, all of it frozen but the new matrices: A random by `seed`, B zero, so that it computes what it
    did before (up to the 4 bits of qlora, which quantizes the projections of all layers, on `device`).

    dtype: of the matrices and of products with 4-bit weights. CapacityError when peft or bitsandbytes is missing.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise _missing("peft", error) from error
    if adapter.kind == "qlora":
        _quantize(model, dtype, device)
    config = LoraConfig(
        r=adapter.rank, lora_alpha=adapter.alpha, lora_dropout=adapter.dropout, target_modules=list(adapter.targets)
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(config, model)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.to(dtype)
    # DeepSpeed frees a layer's weights when the gradient of its input is there: the first layer's needs one too.
    model.enable_input_require_grads()
    return model


def _quantize(model: PreTrainedModel, dtype: torch.dtype, device: torch.device) -> None:
    """Puts each projection of the layers into 4 bits on `device`, one after the other."""
    try:
        from students.linear_4bit import FrozenLinear4bit
    except ImportError as error:
        raise _missing("bitsandbytes", error) from error
    for layer in model.base_model.layers:
        for name, module in list(layer.named_modules()):
            if name.rpartition(".")[2] in TARGETS:
                layer.set_submodule(name, FrozenLinear4bit.of(module, dtype, device))
    model.is_loaded_in_4bit = True  # peft asks the model, not the layer, which kind it is


def _missing(package: str, error: ImportError) -> CapacityError:
    return CapacityError(
        f"an adapter needs {package}, which cannot be imported: {error}",
        where="students.N.adapter",
        remedy=f"pip install {package}, or set adapter: null.",
    )


def drop_frozen(module: nn.Module) -> None:
    """From now on module.state_dict() holds its trained parameters alone."""

    def keep_trained(owner: nn.Module, state: dict, prefix: str, _) -> None:
        trained = {prefix + name for name, parameter in owner.named_parameters() if parameter.requires_grad}
        for name in [name for name in state if name.startswith(prefix) and name not in trained]:
            del state[name]

    module.register_state_dict_post_hook(keep_trained)


@dataclass(frozen=True)
class PlainWeight:
    """One weight of the exported student: its name and shape, and how it comes from parameters of the trained one."""

    name: str
    shape: torch.Size
    parameters: list[nn.Parameter]
    merge: Callable[..., torch.Tensor]  # takes the parameters' values, gives the weight


def plain_weights(model: nn.Module) -> Iterator[PlainWeight]:
    """The weights of the student without adapters, without tied copies, in the model's order; nothing is computed."""
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            continue
        plain = name.replace(".base_layer.", ".")
        if name.endswith(".base_layer.weight"):
            target = model.get_submodule(name.removesuffix(".base_layer.weight"))
            pair = [target.lora_A[NAME].weight, target.lora_B[NAME].weight]
            yield PlainWeight(plain, _shape(parameter), [parameter, *pair], _merging(target))
        else:
            yield PlainWeight(plain, _shape(parameter), [parameter], _whole(parameter))


def _shape(parameter: nn.Parameter) -> torch.Size:
    """Of the weight that the parameter holds, be it in 4 bits or, under ZeRO-3, in parts."""
    state = getattr(parameter, "quant_state", None)
    return getattr(parameter, "ds_shape", parameter.shape) if state is None else state.shape


def _whole(parameter: nn.Parameter) -> Callable[[torch.Tensor], torch.Tensor]:
    state = getattr(parameter, "quant_state", None)
    return (lambda value: value) if state is None else (lambda value: _dequantized(value, state))


def _merging(target: nn.Module) -> Callable[..., torch.Tensor]:
    base, scale = _whole(target.base_layer.weight), target.scaling[NAME]

    def merge(weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return base(weight).float() + scale * (b.float() @ a.float())

    return merge


def _dequantized(codes: torch.Tensor, state) -> torch.Tensor:
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(codes, state)
