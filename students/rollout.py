"""Sampling from a live student: for evaluation, and for traces of its own while it trains."""

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import nn
from transformers import PreTrainedTokenizerFast

from distill import tokens
from distill.generate import Generator
from distill.records import CaptureSpec, Sample, SampleRequest, SamplingParams, TokenDists
from distill.slots import SlotModel


class Rollout:
    """Draws and scores completions of a dense model that is in memory, with its weights as they are at each call.

    The model goes to `device`, is in evaluation mode while samples are drawn, and is left in the mode it was found in.
    Whole weights are needed: a ZeRO-3 student is sampled from its gathered or exported copy.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerFast,
        device: str | torch.device = "cpu",
        batch_size: int = 256,
        stop_ids: Iterable[int] | None = None,
    ):
        """batch_size: rows sampled at once; stop_ids: those of the tokenizer when not given."""
        self.tokenizer, self.stop_ids = tokenizer, tokens.stop_ids(tokenizer, stop_ids)
        slots = SlotModel(model.to(device), max(tokenizer.get_vocab().values()) + 1)
        self.vocab_size = slots.vocab_size
        self._generator = Generator(slots, batch_size, self.stop_ids)

    def sample(
        self, requests: Iterable[SampleRequest], params: SamplingParams, capture: CaptureSpec | None = None
    ) -> Iterator[Sample]:
        """One Sample a request, as they finish; with `capture`, each with the distributions of its tokens."""
        return self._generator.sample(requests, params, capture)

    def score(self, sequences: Sequence[tuple[Sequence[int], Sequence[int]]], capture: CaptureSpec) -> list[TokenDists]:
        """The distributions of each completion's tokens, for (prompt_ids, completion_ids) pairs in the order given."""
        return self._generator.score(sequences, capture)
