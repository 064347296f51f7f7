"""Which models run over pages with our own kernels, and their token loop, on one GPU or on several that hold one."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig

from distill.split import Split
from teachers import dense, runner
from teachers.mesh import Mesh
from teachers.sampler import PagedGenerator
from teachers.scaled import BLOCK

FP8_SINCE = (8, 9)  # compute capability: Ada, Hopper and their successors
TokenBytes = Callable[[], Sequence[bytes]]


def runner_of(model: nn.Module, vocab_size: int, split: Split | None = None) -> runner.Runner | None:
    """The paged forward pass of this model; None for a family, or a size, that it does not know.

    split: this rank's place among those that hold the model, which all call this at the same time.
    """
    makers = ((runner.unsupported, runner.Runner), (dense.unsupported, dense.DenseRunner))
    maker = next((maker for unsupported, maker in makers if unsupported(model.config) is None), None)
    if maker is None:
        return None
    return maker(model, vocab_size, Mesh(split, model.device) if split and split.size > 1 else None)


def keeps_fp8(folder: Path, block: tuple[int, int] | None, device: torch.device) -> bool:
    """Whether routed experts that the checkpoint stores in FP8 stay in it: those of DeepSeek-V3, on GPUs that read it.

    block: the rows and columns that share a factor; None for a checkpoint without FP8.
    """
    if block != (BLOCK, BLOCK) or device.type != "cuda" or torch.cuda.get_device_capability(device) < FP8_SINCE:
        return False
    return (
        runner.unsupported(AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)) is None
    )


def paged_loop(
    model: nn.Module, vocab_size: int, batch_size: int, stop_ids: Iterable[int],
    token_bytes: TokenBytes | None = None, split: Split | None = None,
) -> PagedGenerator | None:  # fmt: skip
    """The loop over pages of a model on a GPU; None where the loop over slots must serve."""
    found = runner_of(model, vocab_size, split) if model.device.type == "cuda" else None
    return found and PagedGenerator(found, batch_size, stop_ids, token_bytes)
