"""What the settings of optimizers, offload and adapters must agree on, and what they need of this machine."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING

from distill.config_load import Loc, Origin, Problem
from distill.errors import CapacityError, DistillError

if TYPE_CHECKING:
    from distill.config import Config


def optimizer_problems(config: Config, origin: Origin) -> Iterator[Problem]:
    """Settings that DeepSpeed or bitsandbytes cannot carry out together, one sentence each with the remedy."""

    def problem(name: str, must: str, *others: str) -> Problem:
        locs: list[Loc] = [("train", each) for each in (name, *others)]
        return Problem(tuple(locs), f"{origin.name(locs[0])} is {getattr(config.train, name)}; {must}")

    train = config.train
    need = {"none": 0, "cpu": 1, "nvme": 3}[train.offload]
    if train.zero_stage < need:
        must = f"it must be >= {need} with train.offload {train.offload}. Raise it, or use offload: none."
        yield problem("zero_stage", must, "offload")
    if train.offload_params != "none" and train.zero_stage != 3:
        must = "it must be 3 with train.offload_params: lower stages need every weight on every device. Use 3."
        yield problem("zero_stage", must, "offload_params")
    if train.optimizer != "adamw" and train.offload != "none":
        must = "its state cannot be offloaded. Use adamw, paged_adamw8bit with offload: none, or adamw8bit with that."
        yield problem("optimizer", must, "offload")
    if train.master_weights == "none" and train.offload != "none":
        yield problem("master_weights", "offloaded state comes with them. Use float32, or offload: none.", "offload")
    if train.master_weights == "none" and train.dtype == "float32":
        yield problem("master_weights", "weights of float32 need none. Use float32, or dtype: bfloat16.", "dtype")
    if train.offload_params == "nvme" and train.master_weights == "none":
        must = "weights in files need master weights of float32. Use float32, or offload_params: cpu."
        yield problem("offload_params", must, "master_weights")
    if train.optimizer == "paged_adamw8bit" and config.hardware.device == "cpu":
        must = "only CUDA moves pages between a GPU and its host. Use adamw8bit."
        yield Problem(
            (("train", "optimizer"), ("hardware", "device")),
            f"{origin.name(('train', 'optimizer'))} is paged_adamw8bit; {must}",
        )
    for i, student in enumerate(config.students):
        targets = student.adapter.targets if student.adapter is not None else []
        if len(set(targets)) < len(targets):
            at: Loc = ("students", i, "adapter", "targets")
            yield Problem((at,), f"{origin.name(at)} is {targets}; each can be named once. Remove the repeated ones.")
        if student.adapter is not None and student.adapter.kind == "qlora" and train.zero_stage == 3:
            loc: Loc = ("students", i, "adapter", "kind")
            must = "ZeRO-3 cannot divide weights of 4 bits. Use zero_stage: 2, or kind: lora."
            yield Problem((loc, ("train", "zero_stage")), f"{origin.name(loc)} is 'qlora'; {must}")


def missing_for_optimizer(config: Config) -> Iterator[DistillError]:
    """CapacityErrors for packages, compilers and libraries that the chosen optimizer, offload and adapters need."""
    train, adapters = config.train, [student.adapter for student in config.students if student.adapter is not None]
    if train.optimizer == "paged_adamw8bit" and not import_module("torch").cuda.is_available():
        yield CapacityError(
            "train.optimizer is paged_adamw8bit, but only CUDA moves pages between a GPU and its host, and there is no "
            "GPU here",
            remedy="Use --set train.optimizer=adamw8bit, or run on a GPU machine.",
        )
    if train.optimizer != "adamw" and find_spec("bitsandbytes") is None:
        yield _missing(f"train.optimizer is {train.optimizer}", "bitsandbytes", "use adamw")
    if any(adapter.kind == "qlora" for adapter in adapters) and find_spec("bitsandbytes") is None:
        yield _missing("an adapter's kind is qlora", "bitsandbytes", "use kind: lora")
    if adapters and find_spec("peft") is None:
        yield _missing("a student has an adapter", "peft", "set adapter: null")
    if train.offload != "none" and config.hardware.device == "cuda":
        for tool in ("g++", "ninja"):
            if shutil.which(tool) is None:
                yield CapacityError(
                    f"train.offload is {train.offload}, for which DeepSpeed compiles its optimizer, but there is no "
                    f"{tool}",
                    remedy=f"Install {tool}, or use --set train.offload=none.",
                )
    on_nvme = [name for name in ("offload", "offload_params") if getattr(train, name) == "nvme"]
    if on_nvme and not _reads_asynchronously():
        yield CapacityError(
            f"train.{on_nvme[0]} is nvme, for which DeepSpeed compiles an operator with libaio, but that cannot be "
            "linked",
            remedy="Install it (Debian: apt-get install libaio-dev; elsewhere CPATH, LIBRARY_PATH and LD_LIBRARY_PATH "
            "may name its folder), or use cpu.",
        )


def _missing(what: str, package: str, otherwise: str) -> CapacityError:
    return CapacityError(f"{what} but {package} is not installed", remedy=f"pip install {package}, or {otherwise}.")


def _reads_asynchronously() -> bool:
    builders = import_module("deepspeed.ops.op_builder")  # seconds to import: only NVMe pays for them
    return builders.AsyncIOBuilder().is_compatible(verbose=False)
