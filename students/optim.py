"""The optimizer of a student: which parameters decay, where the moments live, how wide they and the weights are.

AdamW has three forms here: torch's fused one for float32 weights, its own or the masters that DeepSpeed keeps;
DeepSpeed's for masters in a GPU machine's host memory; and `SlicedAdamW` for what those two cannot hold: moments of
8 bits, and bfloat16 weights without a wider copy.
"""

from pathlib import Path

import torch
from torch import nn

from distill.config import Train
from distill.errors import CapacityError
from students.sliced_adamw import SlicedAdamW

EPSILON = 1e-8


def make_optimizer(module: nn.Module, train: Train, dtype: torch.dtype, device: torch.device) -> torch.optim.Optimizer:
    """AdamW as `train` asks for it, over the trainable parameters of `module`.

    dtype: of the weights in forward and backward. Errors: CapacityError when DeepSpeed's optimizer for the host cannot
    be compiled here, or bitsandbytes is missing.
    """
    groups = parameter_groups(module, train)
    options = {"lr": train.lr, "betas": tuple(train.betas), "eps": EPSILON, "weight_decay": train.weight_decay}
    if train.offload != "none" and device.type == "cuda":
        return _host_adamw(groups, options)
    if train.optimizer == "adamw" and keeps_masters(train, dtype):
        return torch.optim.AdamW(groups, **options, fused=True)
    return SlicedAdamW(groups, **options, paged=train.optimizer == "paged_adamw8bit" and device.type == "cuda")


def keeps_masters(train: Train, dtype: torch.dtype) -> bool:
    """Whether each weight has a float32 form: a master beside it, or itself."""
    return dtype == torch.float32 or train.master_weights == "float32"


def parameter_groups(module: nn.Module, train: Train) -> list[dict]:
    """Matrices decay, gains and biases do not; embedding and head may learn at a rate of their own.

    Adam moves the row of a rare token by several times lr each time it is seen: a high lr wipes out what the base knew.
    With 8-bit moments (`moment_bits` 8) gains and biases keep 32, they are few; so does the embedding, most of whose
    rows have no gradient in a step, while 256 neighbours share one scale.
    """
    groups: dict[tuple[str, int], list] = {}
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        matrix = len(getattr(parameter, "ds_shape", parameter.shape)) >= 2  # ZeRO-3 leaves a flat part in its place
        slow = train.embedding_lr_ratio < 1 and ("embed_tokens" in name or "lm_head" in name)
        kind = "slow" if slow else "matrices" if matrix else "others"
        narrow = train.optimizer != "adamw" and matrix and "embed_tokens" not in name
        groups.setdefault((kind, 8 if narrow else 32), []).append(parameter)
    order = ("matrices", "others", "slow")
    return [_group(*key, groups[key], train) for key in sorted(groups, key=lambda key: (order.index(key[0]), key[1]))]


def _group(kind: str, bits: int, parameters: list[nn.Parameter], train: Train) -> dict:
    group = {"params": parameters, "weight_decay": 0.0 if kind == "others" else train.weight_decay}
    if train.optimizer != "adamw":
        group["moment_bits"] = bits
    if kind == "slow":
        group["lr_ratio"] = train.embedding_lr_ratio
    return group


def lowest_stage(train: Train, dtype: torch.dtype) -> int:
    """The least ZeRO stage: DeepSpeed keeps masters of bfloat16 weights from stage 1 on, on one rank too."""
    return 1 if dtype == torch.bfloat16 and train.master_weights == "float32" else 0


def precision(train: Train, stage: int, dtype: torch.dtype) -> dict:
    """What DeepSpeed's config says of the weights' precision and of an optimizer that it does not know."""
    settings: dict = {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
    if dtype != torch.bfloat16:
        return settings
    if train.master_weights == "float32":
        return settings | {
            "bf16": {"enabled": True, "check_grad_overflow": True, "immediate_grad_update": True},
            "data_types": {"grad_accum_dtype": "fp32"},
        }
    if stage == 0:  # without a section of its own DeepSpeed leaves bfloat16 weights and gradients as they are
        return settings
    bf16 = {"enabled": True, "check_grad_overflow": True, "bf16_master_weights_and_grads": True}
    return settings | {
        "bf16": bf16 | {"bf16_optimizer_states": True},
        "data_types": {"grad_accum_dtype": "bf16"},
    }


def offload_places(train: Train, folder: Path) -> dict:
    """What the ZeRO section of DeepSpeed's config says of where optimizer state and weights lie; `folder` is NVMe's."""
    places: dict = {}
    for name, place in (("offload_optimizer", train.offload), ("offload_param", train.offload_params)):
        if place != "none":
            places[name] = {"device": place, "pin_memory": True}
        if place == "nvme":
            places[name]["nvme_path"] = str(folder)
    return places


def _host_adamw(groups: list[dict], options: dict) -> torch.optim.Optimizer:
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    try:
        return DeepSpeedCPUAdam(groups, **options, adamw_mode=True)
    except Exception as error:  # a missing compiler, ninja or header: each a class of its own
        raise CapacityError(
            f"DeepSpeed's optimizer for host memory cannot be compiled: {error}",
            where="train.offload",
            value="cpu or nvme",
            remedy="Install g++ and ninja (and the CUDA headers that torch was built with), or use offload: none.",
        ) from error
