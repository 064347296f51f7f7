"""What every paged runner must do, whatever it runs."""

from collections.abc import Callable

import numpy as np
import torch
from sampling_models import VOCAB

from teachers.paged import PagePool
from teachers.runner import Runner, Segment


def reference(model, ids_T: torch.Tensor) -> torch.Tensor:
    """transformers' logits [T, V]."""
    with torch.inference_mode():
        return model(ids_T[None]).logits[0]


def pool_of(runner: Runner, pages: int, page_tokens: int) -> PagePool:
    how = {"dtype": torch.float32, "device": runner.device, "page_tokens": page_tokens}
    return PagePool(len(runner.layers), pages, runner.entry_size, **how)


def check_prefill_in_chunks_and_decode(model, make: Callable[..., Runner]) -> None:
    """In one pass, in chunks over pages and token by token: the logits of the whole forward."""
    ids_T = torch.from_numpy(np.random.default_rng(0).integers(0, VOCAB, 90))
    wanted_TV = reference(model, ids_T)
    runner = make(model)
    assert torch.equal(reference(model, ids_T), wanted_TV)  # the model still runs, on views of the fused weights
    whole = runner.prefill(ids_T, torch.arange(90), [Segment(0, 90)], None, None)
    assert (runner.logits(runner.finish(whole)) - wanted_TV).abs().max() < 1e-4

    pool = pool_of(runner, 14, 8)
    pages = pool.take(12)[::-1]
    slots_T = torch.from_numpy(pool.slots(pages, 0, 90))
    for start, stop in ((0, 30), (30, 33), (33, 60)):
        segment = Segment(0, stop - start, slots_T[:start] if start else None)
        parts = runner.prefill(ids_T[start:stop], torch.arange(start, stop), [segment], pool, slots_T[start:stop])
        assert (runner.logits(runner.finish(parts)) - wanted_TV[start:stop]).abs().max() < 1e-4
    tables = torch.tensor([pages], dtype=torch.int32)
    for length in range(60, 90):
        place = torch.tensor([length], dtype=torch.int32)
        logits_1V = runner.decode(ids_T[length : length + 1], place, tables, runner.everyone, pool)
        assert (logits_1V[0] - wanted_TV[length]).abs().max() < 1e-4
