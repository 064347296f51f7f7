"""A teacher over several ranks: DeepSpeed AutoEP (routed experts) and AutoTP (attention, dense and shared experts).

No rank ever holds the model. It is built without memory (meta), given placeholders that have a shape but one element
(stride 0), cut to pieces by deepspeed.initialize at ZeRO stage 0, and only then filled, with this rank's slices alone.
Embedding, head, norms, routers and the low-rank projections into MLA's latents are whole on every rank.

A checkpoint in block-scaled FP8 that is not split comes in the same way, without DeepSpeed.

Shape legend: X experts on this rank, F expert width, E hidden size.
"""

import contextlib
import gc
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM

from distill.errors import ModelError
from distill.slots import SlotCache, SlotModel
from distill.split import Split, expert_problems, tensor_problems
from teachers.lockstep import Lockstep, LockstepModel
from teachers.scaled import ScaledWeights
from teachers.slices import SCALE, LoadReport, Part, Piece, SliceReader, block_of, fill, held_bytes

COLUMNS = [  # cut by output: whole heads, or neurons of an MLP
    r".*\.self_attn\.(q_proj|k_proj|v_proj|q_b_proj|kv_b_proj)\.weight$",
    r".*\.mlp\.(shared_experts\.)?(gate_proj|up_proj)\.weight$",
]
ROWS = [r".*\.self_attn\.o_proj\.weight$", r".*\.mlp\.(shared_experts\.)?down_proj\.weight$"]  # cut by input, summed
EXPERT_WEIGHTS = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}  # AutoEP's names


@dataclass
class Loaded:
    """A model with its weights on this rank's device, what loading took, and what binds it to the other ranks."""

    model: nn.Module | None
    report: LoadReport = field(default_factory=LoadReport)
    lockstep: Lockstep | None = None
    groups: list[dist.ProcessGroup] = field(default_factory=list)

    def slots(self, vocab_size: int, cache_class: type[SlotCache]) -> SlotModel:
        """The model as the token loop runs it."""
        if self.lockstep:
            return LockstepModel(self.lockstep, self.model, vocab_size, cache_class)
        return SlotModel(self.model, vocab_size, cache_class)

    def close(self) -> None:
        """Drops the model and gives back the process groups; called by all ranks when no pass is under way."""
        groups = [*self.groups, *([self.lockstep.group] if self.lockstep else [])]
        device = self.model.device if self.model is not None else None
        self.model, self.groups, self.lockstep = None, [], None
        if groups:
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            dist.all_reduce(torch.zeros(1, device=device))  # nobody is still in a pass once all are here
        for group in groups:
            dist.destroy_process_group(group)


def load(
    config: dict, folder: Path, dtype: torch.dtype, device: torch.device, split: Split, *, keep_fp8: bool = False,
    reader: SliceReader | None = None,
) -> Loaded:  # fmt: skip
    """The model of a checkpoint folder (`config`: its config.json), in evaluation mode; called by all ranks.

    keep_fp8: routed experts that are stored in block-scaled FP8 stay in it, as ScaledWeights in place of parameters,
    which teachers.runner computes with; the modules of transformers cannot. reader: what gives the weights, where not
    the folder's files.
    ModelError before any weight is read when the model cannot be split like this, or is stored in a way not read.
    """
    block = block_of(config, folder)
    _check_split(config, folder, split)
    report, started_s = LoadReport(), time.monotonic()
    model = _placeholder_model(folder, dtype, device)
    loaded = Loaded(model, report)
    if split.size > 1:
        loaded.groups = _partition(model, split, dtype, config)
    _keep_routers_in_float32(model)
    if keep_fp8:
        _keep_experts_in_fp8(model)
    report.look()
    fill(reader or SliceReader(folder, block), pieces(model, split), report)
    report.held_bytes, report.seconds = held_bytes(model), time.monotonic() - started_s
    if split.expert_parallel > 1:
        loaded.lockstep = Lockstep(split, device)
    gc.collect()
    return loaded


def _check_split(config: dict, folder: Path, split: Split) -> None:
    for name, ways, problems in (
        ("tensor_parallel", split.tensor_parallel, tensor_problems),
        ("expert_parallel", split.expert_parallel, expert_problems),
    ):
        for problem in problems(config, ways):
            raise ModelError(
                f"the model cannot be split {ways} ways: {problem}",
                where=str(folder / "config.json"),
                remedy=f"Set teacher.{name} to a number that divides them.",
            )


# --- A model without memory -------------------------------------------------------------------------------------------


def _placeholder_model(folder: Path, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """The model with its real shapes, dtypes and buffers, and one element of memory a parameter."""
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        if hasattr(config, "quantization_config"):
            del config.quantization_config  # the weights are widened as they are read
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    except (ValueError, KeyError, RuntimeError, OSError) as error:
        raise ModelError(
            f"transformers cannot build this model: {str(error).splitlines()[0]}",
            where=str(folder / "config.json"),
            remedy="Use a checkpoint of an architecture that transformers knows; its own code is never run.",
        ) from error
    model.eval().requires_grad_(False)
    base = model.base_model
    base.rotary_emb = type(base.rotary_emb)(config=model.config).to(device)  # its buffers are in no checkpoint
    placeholders: dict[int, nn.Parameter] = {}  # tied weights stay tied
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in placeholders:
                empty = torch.zeros((), dtype=parameter.dtype, device=device).expand(parameter.shape)
                placeholders[id(parameter)] = nn.Parameter(empty, requires_grad=False)
            module._parameters[name] = placeholders[id(parameter)]
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_meta:  # the routers' correction biases: float32, as the reference keeps them
                module._buffers[name] = torch.zeros(buffer.shape, dtype=torch.float32, device=device)
    return model


def _keep_routers_in_float32(model: nn.Module) -> None:
    """AutoEP multiplies the router's weight in the model's dtype; in bfloat16 that sends tokens to other experts."""
    for module in model.modules():
        if _is_autoep(module):
            module.router.gate.__class__ = Float32Linear


def _keep_experts_in_fp8(model: nn.Module) -> None:
    """Room for them in place of the parameters of transformers' experts, or of AutoEP's w1, w2 and w3."""
    for module in model.modules():
        own, down = module._parameters, "w2" if "w1" in module._parameters else "down_proj"
        if "w1" in own or "gate_up_proj" in own:
            experts, size, width = own[down].shape
            for name in EXPERT_WEIGHTS.keys() | {"gate_up_proj", "down_proj"}:
                own.pop(name, None)
            module.gate_up_proj = ScaledWeights.empty(experts, 2, width, size, model.device)
            module.down_proj = ScaledWeights.empty(experts, 1, size, width, model.device)


class Float32Linear(nn.Linear):
    """A linear layer that computes in float32 and answers in float32, whatever its weight is kept in."""

    def forward(self, inputs: Tensor) -> Tensor:
        return F.linear(inputs.float(), self.weight.float())


# --- Cutting it -------------------------------------------------------------------------------------------------------


def _partition(model: nn.Module, split: Split, dtype: torch.dtype, config: dict) -> list[dist.ProcessGroup]:
    """Replaces the model's layers by this rank's parts; the process groups that they talk over."""
    import deepspeed
    from deepspeed.utils import groups

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    with _no_broadcast(), _restored(groups) as made:
        engine, *_ = deepspeed.initialize(model=model, config=_deepspeed_config(split, dtype, config))
    # The layers know their groups; without the engine's hooks the module is a plain one.
    for hook in ("first_dataloader_check", "module_forward_pre_hook", "module_forward_post_hook"):
        if handle := getattr(engine, hook, None):
            handle.remove()
    return made


def _deepspeed_config(split: Split, dtype: torch.dtype, config: dict) -> dict:
    settings: dict = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 0}}
    if split.tensor_parallel > 1:
        specs = [{"patterns": COLUMNS, "partition_type": "column"}, {"patterns": ROWS, "partition_type": "row"}]
        settings["tensor_parallel"] = {
            "autotp_size": split.tensor_parallel,
            "partition_config": {"use_default_specs": False, "layer_specs": specs},
        }
    if split.expert_parallel > 1:
        settings["expert_parallel"] = {
            "enabled": True,
            "autoep_size": split.expert_parallel,
            "preset_model": config["model_type"],
            "use_grouped_mm": dtype == torch.bfloat16,  # the grouped product knows no other dtype everywhere
        }
    return settings


@contextlib.contextmanager
def _no_broadcast() -> Iterator[None]:
    """Rank 0 must not send its weights: they are placeholders, and other ranks' experts are not its own."""
    from deepspeed.runtime.engine import DeepSpeedEngine

    real = DeepSpeedEngine._broadcast_model
    DeepSpeedEngine._broadcast_model = lambda engine: None
    try:
        yield
    finally:
        DeepSpeedEngine._broadcast_model = real


@contextlib.contextmanager
def _restored(groups) -> Iterator[list[dist.ProcessGroup]]:
    """DeepSpeed keeps its groups in globals, which would make a later student tensor-parallel too: put back as found.

    Gives a list that holds the groups made meanwhile, after the block.
    """
    names = [name for name in vars(groups) if name.isupper() and name != "_WORLD_GROUP"] + ["mpu", "mesh_device"]
    found = {name: getattr(groups, name) for name in names}
    for name, value in found.items():
        setattr(groups, name, {} if isinstance(value, dict) else None if _is_group(value) else value)
    made: list[dist.ProcessGroup] = []
    try:
        yield made
    finally:
        values = [getattr(groups, name) for name in names]
        values = [each for value in values for each in (value.values() if isinstance(value, dict) else [value])]
        made += {id(each): each for each in values if _is_group(each) and each is not dist.group.WORLD}.values()
        for name, value in found.items():
            setattr(groups, name, value)


def _is_group(value: object) -> bool:
    return isinstance(value, dist.ProcessGroup)


# --- Filling it -------------------------------------------------------------------------------------------------------


def pieces(model: nn.Module, split: Split) -> Iterator[Piece]:
    """Every parameter and persistent buffer of this rank, with the slice of the checkpoint that belongs there."""
    seen: set[int] = set()
    for path, module in model.named_modules():
        own = [*module._parameters.items(), *module._buffers.items()]
        for name, tensor in own:
            if tensor is None or name in module._non_persistent_buffers_set or id(tensor) in seen:
                continue
            seen.add(id(tensor))
            if tensor.untyped_storage().nbytes() < tensor.nbytes:  # still a placeholder
                tensor.data = torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
            yield from _pieces_of(path, module, name, tensor.data, split)
        for name, value in vars(module).items():
            if isinstance(value, ScaledWeights):
                yield from _scaled_pieces(path, name, value, split.expert_rank * len(value))


def _pieces_of(path: str, module: nn.Module, name: str, tensor: Tensor, split: Split) -> Iterator[Piece]:
    if name in EXPERT_WEIGHTS:  # AutoEP: [X, F, E] or [X, E, F]
        first = split.expert_rank * tensor.shape[0]
        for i, expert in enumerate(tensor):
            yield Piece(expert, f"{path}.{first + i}.{EXPERT_WEIGHTS[name]}.weight")
    elif name == "gate_up_proj":  # transformers' experts: [X, 2 F, E]
        for i, expert in enumerate(tensor):
            for part, half in zip(("gate_proj", "up_proj"), expert.chunk(2)):
                yield Piece(half, f"{path}.{i}.{part}.weight")
    elif name == "down_proj":  # [X, E, F]
        for i, expert in enumerate(tensor):
            yield Piece(expert, f"{path}.{i}.down_proj.weight")
    elif hasattr(module, "_partition_sizes"):
        yield _cut_piece(path, module, name, tensor)
    else:
        # AutoEP: mlp.router.gate.weight and mlp.router.e_score_correction_bias, both below mlp.gate in checkpoints
        owner = path.removesuffix(".gate") if path.endswith(".router.gate") else path
        owner = owner.removesuffix(".router") + ".gate" if owner.endswith(".router") else owner
        yield Piece(tensor, f"{owner}.{name}")


def _scaled_pieces(path: str, name: str, weights: ScaledWeights, first: int) -> Iterator[Piece]:
    """Experts in FP8, from number `first` on: the values, and beside them the factors of their blocks."""
    stored = ("gate_proj", "up_proj") if name == "gate_up_proj" else (name,)
    for i in range(len(weights)):
        for part, of in enumerate(stored):
            yield Piece(weights.values_XPNK[i, part], f"{path}.{first + i}.{of}.weight")
            yield Piece(weights.scales_XPRC[i, part], f"{path}.{first + i}.{of}.weight{SCALE}")


def _cut_piece(path: str, layer: nn.Module, name: str, tensor: Tensor) -> Piece:
    """An AutoTP layer's weight or bias. What is cut by rows keeps its bias whole and adds it after the sum."""
    sizes, place = layer._partition_sizes, layer.tp_index
    part = Part(sum(sizes[:place]), sum(sizes[: place + 1]), sum(sizes))
    if type(layer).__name__ == "LinearAllreduce":
        return Piece(tensor, f"{path}.{name}", columns=part if name == "weight" else None)
    return Piece(tensor, f"{path}.{name}", rows=part)


def _is_autoep(module: nn.Module) -> bool:
    return getattr(module, "_is_autoep_layer", False)
