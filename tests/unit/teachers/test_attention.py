"""Decoding over slots gives the logits of transformers' whole forward pass, row by row, at any mix of lengths."""

import numpy as np
import pytest
import torch
from sampling_models import VOCAB, YARN, deepseek, llama, qwen3, slot_model

from distill.errors import ModelError
from distill.slots import SlotModel

torch.set_num_threads(1)
MODELS = {
    "deepseek": deepseek,
    "deepseek-full-rank-query": lambda: deepseek(q_lora_rank=None),
    "deepseek-split-rotary": lambda: deepseek(rope_interleave=False),
    "deepseek-yarn": lambda: deepseek(rope_parameters=YARN),
    "qwen3": qwen3,
    "llama": llama,
}


@pytest.fixture(params=MODELS, scope="module")
def case(request):
    """A model, sequences of different lengths, and transformers' logits of each before any installation."""
    model, rng = MODELS[request.param](), np.random.default_rng(1)
    sequences = [torch.from_numpy(rng.integers(0, VOCAB, length)) for length in (90, 12, 31, 75, 13)]
    with torch.inference_mode():
        wanted = [model(ids[None]).logits[0] for ids in sequences]
    assert max(logits.abs().max() for logits in wanted) > 5
    return slot_model(model), sequences, wanted


def padded(sequences):
    return torch.nn.utils.rnn.pad_sequence(list(sequences), batch_first=True)


def closeness(logits, wanted):
    return max((a - b).abs().max().item() for a, b in zip(logits, wanted))


def test_prefill_and_decode_equal_the_whole_forward(case):
    model, sequences, wanted = case
    prompts = [60, 3, 11, 59, 1]  # a slot holds 64 tokens at first, and grows at the fifth step
    lengths = torch.tensor(prompts)
    with model.session(slots=6):
        rows = torch.arange(5)
        logits = model.prefill(padded(s[:n] for s, n in zip(sequences, prompts)), lengths, rows, rows)
        assert closeness(logits, [w[n - 1] for w, n in zip(wanted, prompts)]) < 1e-4
        for step in range(8):
            tokens = torch.stack([s[n + step] for s, n in zip(sequences, prompts)])
            logits = model.decode(tokens, lengths + step, int(lengths.max()) + step + 1)
            assert closeness(logits, [w[n + step] for w, n in zip(wanted, prompts)]) < 1e-4


def test_rows_keep_their_history_when_slots_grow_move_and_share_a_prompt(case):
    model, sequences, wanted = case
    with model.session(slots=4):
        one = torch.ones(1, dtype=torch.int64)
        # Sequence 1 alone fills slots 0 and 2 from one computation; sequence 2 comes later to slots 1 and 3.
        model.prefill(sequences[1][None, :5], 5 * one, torch.tensor([0, 2]), torch.tensor([0, 0]))
        model.prefill(sequences[2][None, :20], 20 * one, torch.tensor([1, 3]), torch.tensor([0, 0]))
        model.cache._reserve(200)
        model.move(torch.tensor([0]), torch.tensor([3]), 20)
        logits = model.decode(
            torch.stack([sequences[2][20], sequences[2][20], sequences[1][5]]), torch.tensor([20, 20, 5]), 21
        )
        assert closeness(logits, [wanted[2][20], wanted[2][20], wanted[1][5]]) < 1e-4


def test_a_prompt_of_one_token_needs_no_mask(case):
    model, sequences, wanted = case
    with model.session(slots=1):
        slot, one = torch.tensor([0]), torch.ones(1, dtype=torch.int64)
        logits = model.prefill(sequences[1][None, :1], one, slot, slot)
        assert closeness(logits, [wanted[1][0]]) < 1e-4
        assert closeness([model.logits(model.hidden(sequences[1][None, :1])[0])], [wanted[1][:1]]) < 1e-4


def test_what_a_slot_held_before_does_not_leak_into_its_next_row(case):
    model, sequences, wanted = case
    with model.session(slots=1):
        slot, one = torch.tensor([0]), torch.ones(1, dtype=torch.int64)
        model.prefill(sequences[0][None], 90 * one, slot, slot)
        model.prefill(sequences[1][None, :4], 4 * one, slot, slot)
        logits = model.decode(sequences[1][4:5], 4 * one, 5)
        assert closeness(logits, [wanted[1][4]]) < 1e-4


def test_an_installed_model_still_forwards_as_transformers_does(case):
    model, sequences, wanted = case
    with torch.inference_mode():
        assert closeness([model.model(sequences[2][None]).logits[0]], [wanted[2]]) == 0


def test_latent_cache_holds_rank_plus_rotary_numbers_a_token():
    model = slot_model(deepseek())
    with model.session(slots=2):
        rows = torch.arange(2)
        model.prefill(torch.ones(2, 3, dtype=torch.int64), torch.tensor([3, 2]), rows, rows)
        assert [tuple(part.shape) for state in model.cache.states for part in state] == [(2, 1, 64, 16 + 8)] * 3


def test_sliding_windows_are_refused():
    model = qwen3()
    model.config.layer_types = ["full_attention", "sliding_attention", "full_attention"]
    with pytest.raises(ModelError, match="sliding_attention"):
        SlotModel(model)
