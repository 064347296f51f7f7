"""Sampling from a live student: for evaluation, and for traces of its own while it trains."""

from collections.abc import Callable, Iterable, Iterator, Sequence

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
        faster: Callable[[nn.Module, int, int, Iterable[int]], Generator | None] = lambda *_: None,
    ):
        """batch_size: rows sampled at once; stop_ids: those of the tokenizer when not given. faster: gives another
        loop for (model, vocabulary, batch_size, stop ids), or None where the one over slots must serve; it may lay the
        weights out anew, so it is not for a model that an optimizer holds."""
        self.tokenizer, self.stop_ids = tokenizer, tokens.stop_ids(tokenizer, stop_ids)
        model, ids = model.to(device), max(tokenizer.get_vocab().values()) + 1
        loop = faster(model, ids, batch_size, self.stop_ids)
        self._generator = loop or Generator(SlotModel(model, ids), batch_size, self.stop_ids)
        self.vocab_size = self._generator.model.vocab_size

    def sample(
        self, requests: Iterable[SampleRequest], params: SamplingParams, capture: CaptureSpec | None = None
    ) -> Iterator[Sample]:
        """One Sample a request, as they finish; with `capture`, each with the distributions of its tokens."""
        return self._generator.sample(requests, params, capture)

    def score(self, sequences: Sequence[tuple[Sequence[int], Sequence[int]]], capture: CaptureSpec) -> list[TokenDists]:
        """The distributions of each completion's tokens, for (prompt_ids, completion_ids) pairs in the order given."""
        return self._generator.score(sequences, capture)

    def release(self) -> None:
        """Gives back the memory that is kept from one call to the next; the next call takes it again."""
        self._generator.release()
