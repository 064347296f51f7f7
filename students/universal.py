"""A checkpoint of other ranks or another ZeRO stage, through DeepSpeed's universal format: one file a parameter and
state, `zero/NAME/{fp32,exp_avg,exp_avg_sq}.pt`.

DeepSpeed converts what ZeRO 1 to 3 wrote, and loads it into any of them. Left to do here:
- stage 0, whose state is whole on every rank, is neither converted nor loaded by it;
- what it makes of ZeRO-3 has lost its shapes, without which ZeRO-1 and 2 cannot read it;
- the two files that hold no weights have another name and content for each stage: they are made for the one that loads;
- on loading, ZeRO-3 gives every group of parameters the options of the first (so weight decay would reach gains), and
  the count of steps is lost or shared between the groups: both are set here;
- moments of 8 bits are unknown to it, and it loads moments in the width of the weights, which may be bfloat16. Codes
  are converted to the float32 numbers that they stand for. Where a rank's weights begin elsewhere than before so do the
  blocks that share a scale: loading then costs one rounding to the nearest code, as every step does;
- the moving average, which is not its own, is put together from the ranks' parts.
The last two are in `own/NAME/{exp_avg,exp_avg_sq,average}.pt`, and DeepSpeed loads the weights alone.
"""

import logging
import os
import shutil
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open

from distill.errors import StoreError
from students import swapped
from students.places import Place, places, read_whole
from students.sliced_adamw import MOMENTS, SlicedAdamW, widened

OWN, AVERAGE = "own", "average"
PREFIX = "model."  # comes before a weight's name in the model
WORKERS = 8  # each of them holds whole parameters in memory
REMEDY = "Launch with the ranks and the train.zero_stage that it was written with."


def convert(engine: Any, names: list[str], source: Path, target: Path, stage: int, steps: int) -> None:
    """Writes the checkpoint `source`, written with ZeRO `stage` after `steps` steps, to `target`. For one rank alone.

    engine: a DeepSpeed engine of the same model and optimizer. names: its trained parameters, group by group.
    StoreError when the checkpoint cannot be converted.
    """
    own_moments = isinstance(_inner(engine.optimizer), SlicedAdamW)
    if swapped.is_written(source):
        swapped.convert(source, target)
    elif stage == 0:
        _convert_whole(engine, names, source, target)
    else:
        _convert_parts(_with_wide_moments(engine, source, target / "wide") if own_moments else source, target)
        shutil.rmtree(target / "wide", ignore_errors=True)
    if own_moments:
        for name in names:
            (target / OWN / name).mkdir(parents=True, exist_ok=True)
            for part in MOMENTS:
                os.replace(target / "zero" / name / f"{part}.pt", target / OWN / name / f"{part}.pt")
    for left in target.glob("*_model_states.pt"):
        left.unlink()  # the weights of the forward pass, which are made from those in zero/
    header = {"dp_world_size": 1, "mp_world_size": 1, "module": {}, "buffer_names": [], "lr_scheduler": None}
    header |= {"global_steps": steps, "skipped_steps": 0}
    for name in ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt"):
        torch.save(header, target / name)
    import deepspeed

    groups = [{} for _ in engine.optimizer.param_groups]  # no options: those of the engine stay
    state = {"state": {0: {"step": torch.tensor(float(steps))}}, "param_groups": groups}
    common = {"ds_version": deepspeed.__version__, "param_groups": groups, "optimizer_state_dict": state}
    torch.save(common, target / "zero" / "optimizer_state.pt")


def _convert_parts(source: Path, target: Path) -> None:
    """DeepSpeed's converter, in a process of its own: it forks workers, which a process with a GPU must not."""
    workers = str(min(WORKERS, os.cpu_count() or 1))
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
    command += ["--input_folder", str(source), "--output_folder", str(target)]
    command += ["--num_extract_workers", workers, "--num_merge_workers", workers]
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode != 0:
        said = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise StoreError(
            f"the checkpoint could not be converted for this launch's ranks and ZeRO stage: {said}",
            where=str(source),
            remedy=REMEDY,
        )
    (target.parent / "latest_universal").unlink(missing_ok=True)  # names a folder that is soon gone


def _with_wide_moments(engine: Any, source: Path, target: Path) -> Path:
    """`target`, a checkpoint like `source` with moments of float32 in place of codes; one rank's part after another."""
    target.mkdir(parents=True)
    for path in sorted(source.glob("*.pt")):
        if not path.name.endswith("_optim_states.pt"):
            (target / path.name).symlink_to(path.absolute())
            continue
        content = engine.checkpoint_engine.load(str(path), map_location="cpu")
        inner = content["optimizer_state_dict"]
        state = inner.get("base_optimizer_state", inner.get("optimizer_state_dict"))["state"]  # ZeRO 1 and 2, or 3
        state |= {number: widened(each) for number, each in state.items()}
        torch.save(content, target / path.name)
    return target


def _convert_whole(engine: Any, names: list[str], source: Path, target: Path) -> None:
    content = engine.checkpoint_engine.load(str(source / "mp_rank_00_model_states.pt"), map_location="cpu")
    for number, name in enumerate(names):
        folder = target / "zero" / name
        folder.mkdir(parents=True)
        moments = widened(content["optimizer"]["state"][number])
        parts = {"fp32": content["module"][name].float()} | {part: moments[part] for part in MOMENTS}
        for part, tensor in parts.items():
            torch.save({"param": tensor.clone()}, folder / f"{part}.pt")


def load(engine: Any, names: list[str], folder: Path, stages: tuple[int, int], steps: int) -> None:
    """Loads `folder`, made by `convert`, into weights and optimizer state. All ranks call it at the same time.

    stages: of the checkpoint that it was made of, and of the engine.
    """
    source, target = stages
    optimizer = _inner(engine.optimizer)
    if target == 0:
        _load_whole(engine, names, folder)
    elif swapped.in_files(engine):
        swapped.load_converted(engine, names, folder)
    else:
        if source == 3 and target < 3:
            _give_shapes(engine, names, folder)
        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)  # it warns that tensor parallelism is not used
        try:
            _load_parts(engine, folder, weights_alone=isinstance(optimizer, SlicedAdamW))
        finally:
            logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    if isinstance(optimizer, SlicedAdamW):
        _load_moments(engine, optimizer, names, folder, steps)
    else:
        set_steps(engine, steps)


def _load_parts(engine: Any, folder: Path, *, weights_alone: bool) -> None:
    if not weights_alone:
        engine._config.load_universal_checkpoint = True
        try:
            engine.load_checkpoint(str(folder.parent), tag=folder.name)
        finally:
            engine._config.load_universal_checkpoint = False
        return
    # What load_checkpoint calls; told to leave the optimizer's state alone, it looks for weights in another format.
    optimizer = engine.optimizer
    optimizer.load_state_dict(
        None, checkpoint_folder=str(folder), load_optimizer_states=False, load_from_fp32_weights=True
    )
    if engine.zero_optimization_stage() == 3:
        optimizer.checkpoint_event_epilogue()
    else:
        optimizer.update_lp_params()


def _load_whole(engine: Any, names: list[str], folder: Path) -> None:
    parameters = dict(engine.module.named_parameters())
    for name in names:
        parameter = parameters[name]
        for path in (folder / "zero" / name).glob("*.pt"):
            tensor = read_whole(engine, path)
            if path.stem == "fp32":
                parameter.data.copy_(tensor.view(parameter.shape))
            elif path.stem in MOMENTS:
                moment = tensor.view(parameter.shape).to(parameter.device, torch.float32)
                engine.optimizer.state[parameter][path.stem] = moment


def _load_moments(engine: Any, optimizer: SlicedAdamW, names: list[str], folder: Path, steps: int) -> None:
    """One tensor of the optimizer after another is put together in main memory."""
    optimizer.state.clear()
    owned: dict[int, list[tuple[str, Place]]] = {}
    for name, place in places(engine, names).items():
        owned.setdefault(id(place.owner), []).append((name, place))
    for parts in owned.values():
        owner, group = parts[0][1].owner, optimizer.param_groups[parts[0][1].group]
        moments = [torch.zeros(owner.numel()) for _ in MOMENTS]
        for name, place in parts:
            for moment, part in zip(moments, MOMENTS):
                whole = read_whole(engine, folder / OWN / name / f"{part}.pt")
                moment[place.at : place.at + place.count] = place.of(whole)
        optimizer.set_moments(owner, group, steps, moments)


def convert_average(source: Path, target: Path) -> None:
    """Puts the moving average of the checkpoint `source` together from the ranks' parts. For one rank alone.

    StoreError when the checkpoint has none.
    """
    paths = sorted(source.glob(f"{AVERAGE}_rank_*.safetensors"))
    if not paths:
        raise StoreError("the checkpoint has no moving average", where=str(source), remedy="Set train.ema_decay to 0.")
    with ExitStack() as stack:
        files = [stack.enter_context(safe_open(path, "pt")) for path in paths]
        held = [set(file.keys()) for file in files]
        for name in sorted(set.union(*held)):
            parts = [file.get_tensor(name).view(-1) for file, names in zip(files, held) if name in names]
            folder = target / OWN / f"{PREFIX}{name}"
            folder.mkdir(parents=True, exist_ok=True)
            torch.save({"param": torch.cat(parts)}, folder / f"{AVERAGE}.pt")


def load_average(engine: Any, names: list[str], folder: Path) -> dict[str, torch.Tensor]:
    """This rank's part of what `convert_average` wrote, flat, by name."""
    return {
        name.removeprefix(PREFIX): place.of(read_whole(engine, folder / OWN / name / f"{AVERAGE}.pt")).clone()
        for name, place in places(engine, names).items()
    }


def _give_shapes(engine: Any, names: list[str], folder: Path) -> None:
    """Every rank takes its share of the parameters."""
    parameters = dict(engine.module.named_parameters())
    for name in names[dist.get_rank() :: dist.get_world_size()]:
        for part in ("fp32", *MOMENTS):
            path = folder / "zero" / name / f"{part}.pt"
            if path.exists():
                torch.save({"param": read_whole(engine, path).view(parameters[name].shape)}, path)
    dist.barrier()


def _inner(optimizer: Any) -> Any:
    """The optimizer that DeepSpeed's wraps."""
    while not isinstance(optimizer, torch.optim.Optimizer):
        optimizer = optimizer.optimizer
    return optimizer


def set_steps(engine: Any, steps: int) -> None:
    """Each state of the optimizer gets a count of its own, in the form that the optimizer keeps it in."""
    optimizer = _inner(engine.optimizer)
    in_torch = type(optimizer).__module__.startswith("torch.")
    for parameter, state in optimizer.state.items():
        device = parameter.device if optimizer.defaults.get("fused") or optimizer.defaults.get("capturable") else "cpu"
        state["step"] = torch.tensor(float(steps), device=device) if in_torch else steps
    for group in optimizer.param_groups:
        if "step" in group:
            group["step"] = steps
