"""The teacher: a checkpoint loaded for sampling and scoring, on one device or split over ranks."""

import gc
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from distill import tokens
from distill.checkpoints import check_checkpoint, fingerprint_checkpoint, resolve_checkpoint
from distill.errors import ModelError
from distill.generate import Generator, Row, RowLoop
from distill.records import CaptureSpec, Sample, SampleRequest, SamplingParams, TokenDists
from distill.slots import SlotCache
from distill.split import Split
from distill.tokens import load_tokenizer
from teachers import attention, shard
from teachers.lockstep import LockstepModel
from teachers.runners import keeps_fp8, paged_loop
from teachers.sampler import PagedGenerator
from teachers.slices import block_of
from teachers.speculative import speculative_loop

MLA_FAMILIES = ("deepseek_v3",)


class TeacherEngine:
    """A causal language model that draws completions and says how likely every token was.

    On a GPU, DeepSeek-V3, Llama, Qwen2 and Qwen3 run over pages with kernels of ours (teachers.runners). Elsewhere
    DeepSeek-V3 models decode over the latent cache (teachers.attention), any other model of transformers with full
    attention over keys and values. ModelError before any weight is read when the folder, its
    config, its tokenizer or a weight file is missing, damaged or not safetensors.

    With a `split`, ranks hold the model together. All of them make the engine, call `sample` and `score` equally often
    (with no requests where a rank has none: it returns when all have finished) and close it at the same time; ranks of
    one tensor-parallel group give the same requests and get the same answers.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        *,
        dtype: str = "auto",
        device: str | torch.device = "cpu",
        batch_size: int = 64,
        stop_ids: Iterable[int] | None = None,
        split: Split | None = None,
        speculative: str | None = None,
    ):
        """dtype "auto": float32 on a CPU, bfloat16 on a GPU. batch_size: rows sampled at once. stop_ids: else the
        tokenizer's. split: this rank's place among those that hold the model; None for a whole model. speculative:
        "mtp" draws with the checkpoint's multi-token prediction module (teachers.speculative), for whole models."""
        config = check_checkpoint(path)
        folder = resolve_checkpoint(path)
        self.tokenizer = load_tokenizer(folder)
        self.fingerprint = fingerprint_checkpoint(folder)
        device = torch.device(device)
        ids = max(self.tokenizer.get_vocab().values()) + 1
        _check_config(config, ids, folder)
        self.split = split or Split()
        if self.split.size > 1 or "quantization_config" in config:
            keep = keeps_fp8(folder, block_of(config, folder), device)
            self.loaded = shard.load(config, folder, _dtype(dtype, device), device, self.split, keep_fp8=keep)
        else:
            self.loaded = shard.Loaded(load_model(folder, _dtype(dtype, device), device))
        self.model = self.loaded.model
        self.dtype, self.batch_size = self.model.dtype, batch_size
        self.stop_ids = tokens.stop_ids(self.tokenizer, stop_ids)
        if speculative:
            self._generator: Generator | None = self._speculative(config, folder, ids)
        else:
            self._generator = self._loop(config["model_type"] in MLA_FAMILIES, ids)
        self.vocab_size, self.max_positions = self._generator.model.vocab_size, self._generator.model.max_positions

    def _loop(self, is_mla: bool, ids: int) -> Generator:
        """Over pages, with our own kernels, where GPUs hold a model they know; over slots elsewhere."""
        token_bytes = lambda: tokens.token_bytes(self.tokenizer)  # noqa: E731
        if loop := paged_loop(self.model, ids, self.batch_size, self.stop_ids, token_bytes, self.split):
            return loop
        if is_mla:
            attention.install(self.model)
        slots = self.loaded.slots(ids, attention.LatentCache if is_mla else SlotCache)
        return Generator(slots, self.batch_size, self.stop_ids, token_bytes)

    def _speculative(self, config: dict, folder: os.PathLike, ids: int) -> Generator:
        if self.split.size > 1:
            raise ModelError(
                "speculative decoding needs a whole model on each device",
                where="teacher.speculative",
                value=str(self.split),
                remedy="Set it to null, or teacher.tensor_parallel and teacher.expert_parallel to 1.",
            )
        token_bytes = lambda: tokens.token_bytes(self.tokenizer)  # noqa: E731
        return speculative_loop(self.model, config, folder, ids, self.batch_size, self.stop_ids, token_bytes)

    def sample(
        self, requests: Iterable[SampleRequest], params: SamplingParams, capture: CaptureSpec | None = None
    ) -> Iterator[Sample]:
        """One Sample a request, as they finish; with `capture`, each with the distributions of its tokens."""
        return self._open().sample(requests, params, capture)

    def score(self, sequences: Sequence[tuple[Sequence[int], Sequence[int]]], capture: CaptureSpec) -> list[TokenDists]:
        """The distributions of each completion's tokens, for (prompt_ids, completion_ids) pairs in the order given."""
        return self._open().score(sequences, capture)

    def rows(self) -> AbstractContextManager[RowLoop]:
        """The token loop itself, for a service that feeds it between steps (distill.generate)."""
        return self._open().rows()

    def finish_turn(self) -> None:
        """Returns when all ranks that share experts have made the forward passes they want; called by all of them."""
        generator = self._open()
        if isinstance(generator, PagedGenerator):
            generator.finish()
        elif isinstance(generator.model, LockstepModel):
            generator.model.finish()

    def release(self) -> None:
        """Gives back the memory that is kept from one call to the next; the next call takes it again."""
        self._open().release()

    @property
    def counts(self) -> dict[str, int]:
        """What the paged loop counts, by name; nothing for other loops."""
        return self._generator.counts if isinstance(self._generator, PagedGenerator) else {}

    def check(self, row: Row, where: str) -> None:
        """Raises DataError, naming `where`, if the row cannot be drawn."""
        self._open().check(row, where)

    def decode(self, completion_ids: Sequence[int]) -> str:
        """The completion's text, `</think>` and the like kept, without the stop token at its end."""
        ids = list(completion_ids)
        if ids and ids[-1] in self.stop_ids:
            ids.pop()
        return self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def close(self) -> None:
        """Frees the weights. The tokenizer and the fingerprint stay."""
        if isinstance(self._generator, PagedGenerator):
            self.loaded.groups += self._generator.let_go()
        self._generator, self.model = None, None
        gc.collect()  # recorded steps hold on to the groups they talk over
        self.loaded.close()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _open(self) -> Generator:
        if self._generator is None:
            raise RuntimeError("this teacher was closed")
        return self._generator


def load_model(folder: os.PathLike, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """The model in evaluation mode. ModelError when its architecture is unknown or a weight is missing or misshapen."""
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            device_map={"": device} if device.type == "cuda" else None,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
    except (ValueError, KeyError, RuntimeError, OSError) as error:
        raise ModelError(
            f"transformers cannot load this model: {str(error).splitlines()[0]}",
            where=str(folder),
            remedy="Use a checkpoint of an architecture that transformers knows; its own code is never run.",
        ) from error
    if report["missing_keys"]:
        raise ModelError(
            f"{len(report['missing_keys'])} weights are missing from the checkpoint",
            where=str(folder),
            value=min(report["missing_keys"]),
            remedy="Copy the checkpoint again, or correct config.json.",
        )
    return model.eval().requires_grad_(False)


def _dtype(name: str, device: torch.device) -> torch.dtype:
    # On a CPU the same weights widened to float32 give the same routes and samples as the reference, in any batch.
    if name == "auto":
        name = "bfloat16" if device.type == "cuda" else "float32"
    return getattr(torch, name)


def _check_config(config: dict, ids: int, folder: os.PathLike) -> None:
    block_of(config, folder)  # raises for quantised weights that are not read
    if config.get("vocab_size", ids) < ids:
        raise ModelError(
            f"the tokenizer has ids up to {ids - 1}, the model {config['vocab_size']} rows",
            where=str(folder),
            remedy="Use the tokenizer that was saved with these weights.",
        )
