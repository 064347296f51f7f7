"""A checkpoint of other ranks or another ZeRO stage, through DeepSpeed's universal format: one file a parameter and
state, `zero/NAME/{fp32,exp_avg,exp_avg_sq}.pt`.

DeepSpeed converts what ZeRO 1 to 3 wrote, and loads it into any of them. Left to do here:
- stage 0, whose state is whole on every rank, is neither converted nor loaded by it;
- what it makes of ZeRO-3 has lost its shapes, without which ZeRO-1 and 2 cannot read it;
- the two files that hold no weights have another name and content for each stage: they are made for the one that loads;
- on loading, ZeRO-3 gives every group of parameters the options of the first (so weight decay would reach gains), and
  the count of steps is lost or shared between the groups: both are set here.
"""

import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from distill.errors import StoreError

STATES = ("exp_avg", "exp_avg_sq")
WORKERS = 8  # each of them holds whole parameters in memory


def convert(engine: Any, names: list[str], source: Path, target: Path, stage: int, steps: int) -> None:
    """Writes the checkpoint `source`, written with ZeRO `stage` after `steps` steps, to `target`. For one rank alone.

    engine: a DeepSpeed engine of the same model and optimizer. names: its trained parameters, group by group.
    StoreError when the checkpoint cannot be converted.
    """
    if stage == 0:
        _convert_whole(engine, names, source, target)
    else:
        _convert_parts(source, target)
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
            remedy="Launch with the ranks and the train.zero_stage that it was written with.",
        )
    (target.parent / "latest_universal").unlink(missing_ok=True)  # names a folder that is soon gone


def _convert_whole(engine: Any, names: list[str], source: Path, target: Path) -> None:
    content = engine.checkpoint_engine.load(str(source / "mp_rank_00_model_states.pt"), map_location="cpu")
    for number, name in enumerate(names):
        folder = target / "zero" / name
        folder.mkdir(parents=True)
        moments = content["optimizer"]["state"][number]
        parts = {"fp32": content["module"][name].float()} | {part: moments[part] for part in STATES}
        for part, tensor in parts.items():
            torch.save({"param": tensor.clone()}, folder / f"{part}.pt")


def load(engine: Any, names: list[str], folder: Path, stages: tuple[int, int], steps: int) -> None:
    """Loads `folder`, made by `convert`, into weights and optimizer state. All ranks call it at the same time.

    stages: of the checkpoint that it was made of, and of the engine.
    """
    source, target = stages
    if target == 0:
        _load_whole(engine, names, folder)
    else:
        if source == 3 and target < 3:
            _give_shapes(engine, names, folder)
        engine._config.load_universal_checkpoint = True
        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)  # it warns that tensor parallelism is not used
        try:
            engine.load_checkpoint(str(folder.parent), tag=folder.name)
        finally:
            engine._config.load_universal_checkpoint = False
            logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    _set_steps(_inner(engine.optimizer), steps)


def _load_whole(engine: Any, names: list[str], folder: Path) -> None:
    parameters = dict(engine.module.named_parameters())
    for name in names:
        parameter, state = parameters[name], engine.optimizer.state[parameters[name]]
        for part in ("fp32", *STATES):
            tensor = _read(engine, folder / "zero" / name / f"{part}.pt").view(parameter.shape)
            if part == "fp32":
                parameter.data.copy_(tensor)
            else:
                state[part] = tensor.to(parameter.device, torch.float32)


def _read(engine: Any, path: Path) -> torch.Tensor:
    content = engine.checkpoint_engine.load(str(path), map_location="cpu")
    return content["param"] if isinstance(content, dict) else content


def _give_shapes(engine: Any, names: list[str], folder: Path) -> None:
    """Every rank takes its share of the parameters."""
    parameters = dict(engine.module.named_parameters())
    for name in names[dist.get_rank() :: dist.get_world_size()]:
        for part in ("fp32", *STATES):
            path = folder / "zero" / name / f"{part}.pt"
            torch.save({"param": _read(engine, path).view(parameters[name].shape)}, path)
    dist.barrier()


def _inner(optimizer: Any) -> Any:
    """The optimizer that DeepSpeed's wraps."""
    while not isinstance(optimizer, torch.optim.Optimizer):
        optimizer = optimizer.optimizer
    return optimizer


def _set_steps(optimizer: torch.optim.Optimizer, steps: int) -> None:
    """Each state gets a count of its own, in the form that the optimizer keeps it in."""
    in_torch = type(optimizer).__module__.startswith("torch.")
    for parameter, state in optimizer.state.items():
        device = parameter.device if optimizer.defaults.get("fused") or optimizer.defaults.get("capturable") else "cpu"
        state["step"] = torch.tensor(float(steps), device=device) if in_torch else steps
    for group in optimizer.param_groups:
        if "step" in group:
            group["step"] = steps
