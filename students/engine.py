"""The only file that touches DeepSpeed: ZeRO, gradient accumulation, clipping, its checkpoints, whole weights.

Gradients are SUMS. Each micro-batch's loss is already divided by the global number of trained tokens, so the gradient
of the step is the plain sum over micro-batches and ranks. DeepSpeed averages over ranks; the loss is multiplied by
their number before the backward pass to undo exactly that, and its division by the accumulation steps is switched off.
"""

import gc
import logging
import math
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from distill.config import Train
from distill.dist import Ranks
from distill.errors import ModelError
from students import optim, swapped, universal
from students.adapters import drop_frozen, plain_weights
from students.data import Batch
from students.ema import MovingAverage, trained_parts
from students.layers import gather_whole_layers, prepare_layers
from students.sequence import row_ranks
from students.snapshot import Snapshots
from students.step import StudentStep


class StudentEngine:
    """A student under DeepSpeed. All ranks call every method at the same time.

    data_rank of data_ranks: which rows are this rank's; the ranks that share rows have the same number.
    """

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
        keeps float32 masters unless train.master_weights is none. offload_dir: for what is offloaded to NVMe."""
        import deepspeed

        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        # DeepSpeed keeps master weights of bfloat16 under ZeRO only; with one rank stage 1 is the same as stage 0.
        self.stage = max(train.zero_stage, optim.lowest_stage(train, dtype))
        self.ranks, self.dtype, self.clip_norm = ranks, dtype, train.clip_norm
        self._swapped = offload_dir / "zero_stage_3"  # DeepSpeed's name for what it keeps on NVMe
        self._masters = optim.keeps_masters(train, dtype)
        module.row_ranks = row_ranks(ranks, train.sequence_parallel, module.model.config)
        self.data_rank, self.data_ranks = (n // train.sequence_parallel for n in (ranks.rank, ranks.world))
        prepare_layers(module.model, train, ranks.device)
        places = optim.offload_places(train, offload_dir)
        config = deepspeed_config(train, self.stage, dtype, micro_batches, places)
        if self.stage == 3:
            layer_elements = gather_whole_layers(module.model)
            zero = config["zero_optimization"]
            zero["stage3_prefetch_bucket_size"] = layer_elements
            zero["stage3_max_live_parameters"] = max(3 * layer_elements, 10**9)  # room for the next layer of a 70B
        module = module.to(ranks.device)
        self._frozen = any(not parameter.requires_grad for parameter in module.parameters())
        if self._frozen:
            drop_frozen(module)
        optimizer = optim.make_optimizer(module, train, dtype, ranks.device)
        names = {id(parameter): name for name, parameter in module.named_parameters()}
        self._trained = [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]
        if train.offload_params == "nvme":
            swapped.settle(module.model, config["zero_optimization"])
            if not all(hasattr(parameter, "ds_id") for parameter in module.parameters()):
                swapped.initializer(config, dtype, module=module)
        self._engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=config)
        _add_up_in_one_pass(self._engine.optimizer)
        self._engine.checkpoint_engine = Snapshots(self._engine.checkpoint_engine)
        self._engine.train()
        self._average: MovingAverage | None = None
        if train.ema_decay:
            self._average = MovingAverage(trained_parts(self.module.model, self.stage), train.ema_decay)

    @property
    def module(self) -> StudentStep:
        return self._engine.module

    def accumulate(self, batch: Batch, normalizer: float, *, last: bool) -> torch.Tensor:
        """float64 tensor: loss, then the sums of LossMetrics, of this rank's micro-batch; adds up its gradients.

        Ranks that share rows are given the same batch, and each takes its tokens of it.
        last: whether this is the last micro-batch of the step, after which the ranks add up their gradients.
        """
        self._engine.set_gradient_accumulation_boundary(last)
        if self.module.row_ranks is not None:
            batch = self.module.row_ranks.share(batch)
        loss, sums = self._engine(batch.to(self.ranks.device), normalizer)
        self._engine.backward(loss * self.ranks.world, scale_wrt_gas=False)
        if not last:
            self._engine.step()  # only counts the micro-batch
        return torch.cat([loss.detach().double()[None], sums.to(loss.device)])

    @torch.no_grad()
    def evaluate(self, batch: Batch, normalizer: float) -> torch.Tensor:
        """What `accumulate` returns, without gradients."""
        if self.module.row_ranks is not None:
            batch = self.module.row_ranks.share(batch)
        self._engine.eval()
        loss, sums = self._engine(batch.to(self.ranks.device), normalizer)
        self._engine.train()
        return torch.cat([loss.double()[None], sums.to(loss.device)])

    def step(self, lr: float) -> float:
        """The gradient norm before clipping, over all ranks; updates the weights with this learning rate.

        When the norm is not finite the weights and the optimizer's state stay as they were and the norm is returned.
        """
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_ratio", 1.0)
        norm = self._step()
        if self._average is not None and math.isfinite(norm):
            self._average.update(trained_parts(self.module.model, self.stage))
        return norm

    def _step(self) -> float:
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

    def snapshot(self, folder: Path, tag: str) -> Callable[[], None]:
        """Copies this rank's weights and optimizer state as they are now; calling the result writes them to folder/tag,
        in any thread. With state in files they are written here: host memory may be too small for a copy."""
        if swapped.in_files(self._engine):
            swapped.save(self._engine, self._trained, folder / tag)
            if self._average is not None:
                swapped.write(self._average.state(), folder / tag / self._average_file)
            return self._engine.checkpoint_engine.take()
        self._engine.save_checkpoint(str(folder), tag=tag, save_latest=False, exclude_frozen_parameters=True)
        if self._average is not None and (self.stage > 0 or self.ranks.is_main):
            self._engine.checkpoint_engine.save(self._average.state(), str(folder / tag / self._average_file))
        return self._engine.checkpoint_engine.take()

    def convert(self, source: Path, target: Path, stage: int, steps: int) -> None:
        """Makes of the checkpoint `source`, of ZeRO `stage` and any number of ranks, one for `load_converted`. One rank
        alone calls it. StoreError where that cannot be done."""
        universal.convert(self._engine, self._trained, source, target, stage, steps)
        if self._average is not None:
            universal.convert_average(source, target)

    def load_converted(self, folder: Path, stage: int, steps: int) -> None:
        """Restores what `convert` made of a checkpoint of ZeRO `stage` and `steps` steps."""
        universal.load(self._engine, self._trained, folder, (stage, self.stage), steps)
        if self._average is not None:
            self._average.load_flat(universal.load_average(self._engine, self._trained, folder))

    def can_load(self, path: Path) -> bool:
        """Whether the checkpoint was written by an engine with as much in files as this one, or as little."""
        return swapped.is_written(path) == swapped.in_files(self._engine)

    def load(self, folder: Path, tag: str) -> None:
        """Restores what a snapshot wrote; the number of ranks and the ZeRO stage must be the same."""
        if swapped.in_files(self._engine):
            universal.set_steps(self._engine, swapped.load(self._engine, folder / tag))
        else:
            path, _ = self._engine.load_checkpoint(str(folder), tag=tag, load_module_strict=not self._frozen)
            if path is None:
                where = f"{folder}/{tag}"
                raise ModelError("DeepSpeed found no checkpoint", where=where, remedy="Delete this checkpoint.")
        if self._average is not None:
            self._average.load(load_file(folder / tag / self._average_file))

    def shapes(self) -> dict[str, torch.Size]:
        """Name in the checkpoint -> full shape, without tied copies, in the model's order."""
        return {weight.name: weight.shape for weight in plain_weights(self.module.model)}

    def whole_weights(self, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor | None]]:
        """(name, tensor on CPU in `dtype`) on rank 0, (name, None) elsewhere; one parameter is whole at a time.

        float32 comes from the master weights where the forward pass uses bfloat16. Adapters are merged; of weights that
        have a moving average it is the average.
        """
        from deepspeed.runtime.zero import GatheredParameters
        from deepspeed.utils import safe_get_full_fp32_param

        master = self._masters and dtype == torch.float32 and self.dtype != torch.float32
        averaged: AbstractContextManager = nullcontext()
        if self._average is not None:
            parts = partial(trained_parts, self.module.model, self.stage, keep=True)
            averaged, master = self._average.in_place_of(parts), self.stage > 0

        def value(parameter: nn.Parameter) -> torch.Tensor:
            return safe_get_full_fp32_param(parameter) if master and parameter.requires_grad else parameter.detach()

        with averaged:
            for weight in plain_weights(self.module.model):
                with GatheredParameters(weight.parameters) if self.stage == 3 else nullcontext():
                    values = [value(parameter) for parameter in weight.parameters]  # ranks may meet in this
                    if self.ranks.is_main:
                        yield weight.name, weight.merge(*values).to("cpu", dtype, copy=True)
                    else:
                        yield weight.name, None

    @property
    def _average_file(self) -> str:
        return f"average_rank_{self.ranks.rank if self.stage > 0 else 0:05d}.safetensors"

    def forget_average(self) -> None:
        """From now on whole_weights gives the weights themselves, also where a moving average was kept."""
        self._average = None

    def close(self) -> None:
        """Frees the weights and the optimizer's state."""
        self._engine.destroy()
        self._engine = None
        gc.collect()
        self.ranks.barrier()
        shutil.rmtree(self._swapped, ignore_errors=True)  # which the ranks of a host share
        if self.ranks.device.type == "cuda":
            torch.cuda.empty_cache()


def _add_up_in_one_pass(optimizer: object) -> None:
    """Makes DeepSpeed's optimizer for bfloat16 add a gradient to its float32 sum in one kernel as soon as it exists,
    beside the rest of the backward pass, and then let it go.

    As it comes it keeps all gradients until the pass ends, then zeroes, adds in bfloat16, converts and adds again:
    three times the memory traffic and a second copy of the model, for the same sum.
    """
    from deepspeed.runtime.bf16_optimizer import BF16_Optimizer

    if not isinstance(optimizer, BF16_Optimizer):
        return
    add_to, beside = torch.Tensor.add_, None
    if torch.cuda.is_available():
        from students import sums

        add_to, beside = sums.add, torch.cuda.Stream()

    def add(parameter: nn.Parameter, group: int, index: int, clear_lp_grads: bool) -> None:
        if parameter.grad is None:
            return
        total, gradient = optimizer.fp32_groups_gradients[group][index], parameter.grad
        with _on(beside, gradient):
            add_to(total, gradient.view(total.shape))
        parameter._hp_grad = total
        optimizer.fp32_groups_has_gradients[group][index] = True

    def all_added(clear_lp_grads: bool = False) -> None:
        if beside is not None:
            torch.cuda.current_stream().wait_stream(beside)

    optimizer._update_hp_grad, optimizer.update_hp_grads = add, all_added


@contextmanager
def _on(stream: torch.cuda.Stream | None, tensor: torch.Tensor) -> Iterator[None]:
    """Work on `tensor` goes to this stream, after all that was asked of the present one; None: stays."""
    if stream is None:
        yield
        return
    stream.wait_stream(torch.cuda.current_stream())
    tensor.record_stream(stream)
    with torch.cuda.stream(stream):
        yield


def deepspeed_config(train: Train, stage: int, dtype: torch.dtype, micro_batches: int, places: dict) -> dict:
    """DeepSpeed's own settings for these; `places` as optim.offload_places has them. A "sample" of DeepSpeed is one
    micro-batch here."""
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": micro_batches,
        "zero_optimization": {"stage": stage, **places},
        "gradient_clipping": train.clip_norm if stage > 0 else 0.0,  # stage 0 is clipped here: DeepSpeed hides its norm
        # Summed in float32 over micro-batches, so over ranks too where that is once a step; DeepSpeed would round here.
        "communication_data_type": "fp32" if stage == 1 and train.master_weights == "float32" else None,
        "steps_per_print": None,
        "wall_clock_breakdown": False,
        **optim.precision(train, stage, dtype),
    }
