"""The only file that touches DeepSpeed: ZeRO, gradient accumulation, clipping, its checkpoints, whole weights.

Gradients are SUMS. Each micro-batch's loss is already divided by the global number of trained tokens, so the gradient
of the step is the plain sum over micro-batches and ranks. DeepSpeed averages over ranks; the loss is multiplied by
their number before the backward pass to undo exactly that, and its division by the accumulation steps is switched off.
"""

import gc
import logging
import math
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import nn

from distill.config import Train
from distill.dist import Ranks
from distill.errors import ModelError
from students.data import Batch
from students.layers import prepare_layers
from students.step import StudentStep


class StudentEngine:
    """A student under DeepSpeed. All ranks call every method at the same time."""

    def __init__(
        self,
        module: StudentStep,
        train: Train,
        ranks: Ranks,
        *,
        dtype: torch.dtype,
        micro_batches: int,
        offload_dir: Path,
    ):
        """micro_batches: the most that one step has on a rank. dtype: of the weights in forward and backward; bfloat16
        keeps float32 master weights. offload_dir: used with train.offload nvme alone."""
        import deepspeed

        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        # DeepSpeed keeps master weights of bfloat16 under ZeRO only; with one rank stage 1 is the same as stage 0.
        self.stage = max(train.zero_stage, 1) if dtype == torch.bfloat16 else train.zero_stage
        self.ranks, self.dtype, self.clip_norm = ranks, dtype, train.clip_norm
        compiled = train.compile == "on" or (train.compile == "auto" and ranks.device.type == "cuda")
        prepare_layers(module.model, compiled=compiled, recomputed=train.activation_checkpointing)
        config = deepspeed_config(train, self.stage, dtype, micro_batches, offload_dir)
        optimizer = None if train.offload != "none" else _adamw(module, train)
        self._engine, *_ = deepspeed.initialize(
            model=module.to(ranks.device), optimizer=optimizer, model_parameters=_groups(module, train), config=config
        )
        self._engine.train()

    @property
    def module(self) -> StudentStep:
        return self._engine.module

    def accumulate(self, batch: Batch, normalizer: float, *, last: bool) -> torch.Tensor:
        """float64 tensor: loss, then the sums of LossMetrics, of this rank's micro-batch; adds up its gradients.

        last: whether this is the last micro-batch of the step, after which the ranks add up their gradients.
        """
        self._engine.set_gradient_accumulation_boundary(last)
        loss, sums = self._engine(batch.to(self.ranks.device), normalizer)
        self._engine.backward(loss * self.ranks.world, scale_wrt_gas=False)
        if not last:
            self._engine.step()  # only counts the micro-batch
        return torch.cat([loss.detach().double()[None], sums.to(loss.device)])

    def step(self, lr: float) -> float:
        """The gradient norm before clipping, over all ranks; updates the weights with this learning rate.

        When the norm is not finite the weights and the optimizer's state stay as they were and the norm is returned.
        """
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_ratio", 1.0)
        if self.stage > 0:
            self._engine.step()  # refuses an invalid norm by itself, before any weight changes
            return float(self._engine.get_global_grad_norm())
        limit = self.clip_norm if self.clip_norm > 0 else float("inf")
        norm = float(nn.utils.clip_grad_norm_(self._engine.module.parameters(), limit))
        if math.isfinite(norm):
            self._engine.step()
        else:
            self._engine.zero_grad()
        return norm

    def add_up(self, flag: float, values: torch.Tensor) -> list[float]:
        """[values[0], flag, *values[1:]], each summed over the ranks: one all-reduce, and the step's one wait."""
        total = torch.cat([values[:1], values.new_tensor([flag]), values[1:]])
        torch.distributed.all_reduce(total)
        return total.tolist()

    def save(self, folder: Path, tag: str) -> None:
        """Writes weights and optimizer state of all ranks to folder/tag."""
        self._engine.save_checkpoint(str(folder), tag=tag, save_latest=False)

    def load(self, folder: Path, tag: str) -> None:
        """Restores what `save` wrote; the number of ranks and the ZeRO stage must be the same."""
        path, _ = self._engine.load_checkpoint(str(folder), tag=tag)
        if path is None:
            raise ModelError("DeepSpeed found no checkpoint", where=f"{folder}/{tag}", remedy="Delete this checkpoint.")

    def shapes(self) -> dict[str, torch.Size]:
        """Name in the checkpoint -> full shape, without tied copies, in the model's order."""
        return {name: getattr(p, "ds_shape", p.shape) for name, p in self.module.model.named_parameters()}

    def whole_weights(self, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor | None]]:
        """(name, tensor on CPU in `dtype`) on rank 0, (name, None) elsewhere; one parameter is whole at a time.

        float32 comes from the master weights where the forward pass uses bfloat16.
        """
        from deepspeed.runtime.zero import GatheredParameters
        from deepspeed.utils import safe_get_full_fp32_param

        master = dtype == torch.float32 and self.dtype != torch.float32
        for name, parameter in self.module.model.named_parameters():
            with GatheredParameters([parameter]) if self.stage == 3 else nullcontext():
                tensor = safe_get_full_fp32_param(parameter) if master else parameter.detach()
                yield name, tensor.to("cpu", dtype, copy=True) if self.ranks.is_main else None

    def close(self) -> None:
        """Frees the weights and the optimizer's state."""
        self._engine.destroy()
        self._engine = None
        gc.collect()
        if self.ranks.device.type == "cuda":
            torch.cuda.empty_cache()


def deepspeed_config(train: Train, stage: int, dtype: torch.dtype, micro_batches: int, offload_dir: Path) -> dict:
    """DeepSpeed's own settings for these. A "sample" of DeepSpeed is one micro-batch here."""
    zero: dict = {"stage": stage}
    if train.offload != "none":
        place = {"device": train.offload, "pin_memory": True}
        if train.offload == "nvme":
            place["nvme_path"] = str(offload_dir)
        zero["offload_optimizer"] = place
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": micro_batches,
        "zero_optimization": zero,
        "gradient_clipping": train.clip_norm if stage > 0 else 0.0,  # stage 0 is clipped here: DeepSpeed hides its norm
        "steps_per_print": None,
        "wall_clock_breakdown": False,
    }
    if train.offload != "none":
        config["optimizer"] = {"type": "AdamW", "params": _adamw_options(train)}
    if dtype == torch.bfloat16:
        config["bf16"] = {"enabled": True, "check_grad_overflow": True}
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    return config


def _adamw_options(train: Train) -> dict:
    return {"lr": train.lr, "betas": tuple(train.betas), "eps": 1e-8, "weight_decay": train.weight_decay}


def _adamw(module: nn.Module, train: Train) -> torch.optim.Optimizer:
    return torch.optim.AdamW(_groups(module, train), **_adamw_options(train), fused=True)


def _groups(module: nn.Module, train: Train) -> list[dict]:
    """Matrices decay, gains and biases do not; embedding and head may learn at a rate of their own.

    Adam moves the row of a rare token by several times lr each time it is seen: a high lr wipes out what the base knew.
    """
    named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    slow = (
        [p for name, p in named if "embed_tokens" in name or "lm_head" in name] if train.embedding_lr_ratio < 1 else []
    )
    chosen = {id(p) for p in slow}
    matrices, others = (
        [p for _, p in named if id(p) not in chosen and (p.dim() >= 2) == wide] for wide in (True, False)
    )
    groups = [{"params": matrices, "weight_decay": train.weight_decay}, {"params": others, "weight_decay": 0.0}]
    if slow:
        ratio = train.embedding_lr_ratio
        groups.append({"params": slow, "weight_decay": train.weight_decay, "lr_ratio": ratio})
    return groups
