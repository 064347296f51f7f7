"""Sampling from a student in memory: with its own packed attention, in training mode, as its weights are now."""

import pytest
import torch

from distill.records import CaptureSpec, SampleRequest, SamplingParams
from distill.tokens import render_prompt, stop_ids
from students.model import load_student
from students.rollout import Rollout

PARAMS = SamplingParams(0.8, 0.95, 0, 16)


@pytest.fixture
def student(world):
    return load_student(world / "model")


def asked(tokenizer) -> list[SampleRequest]:
    prompts = [tuple(render_prompt(tokenizer, f"What is {i} times {i}?")) for i in range(4)]
    return [SampleRequest(str(i), j, ids, 10 * i + j) for i, ids in enumerate(prompts) for j in range(4)]


def table(samples) -> dict:
    return {(s.key, s.sample_index): s.completion_ids for s in samples}


def test_samples_are_those_of_any_batch_size(student):
    model, tokenizer = student
    tables = [table(Rollout(model, tokenizer, "cpu", size).sample(asked(tokenizer), PARAMS)) for size in (256, 3)]
    assert tables[0] == tables[1] and len(tables[0]) == 16


def test_a_student_in_training_is_left_in_training_with_its_attention(student):
    model, tokenizer = student
    attention = model.config._attn_implementation
    rollout = Rollout(model, tokenizer, "cpu", 8)
    list(rollout.sample(asked(tokenizer), PARAMS))
    rollout.score([((20, 21), (22, 23))], CaptureSpec())
    assert model.training and model.config._attn_implementation == attention
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_rollout_follows_the_weights(student):
    model, tokenizer = student
    rollout = Rollout(model, tokenizer, "cpu", 8)
    before = table(rollout.sample(asked(tokenizer), PARAMS))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    assert table(rollout.sample(asked(tokenizer), PARAMS)) != before


def test_scores_are_the_models_log_probabilities(student):
    model, tokenizer = student
    prompt, completion = render_prompt(tokenizer, "What is 2 times 3?"), [30, 31, 32, 33]
    (scored,) = Rollout(model, tokenizer, "cpu", 8).score([(prompt, completion)], CaptureSpec(64, 0.0))
    ids = torch.tensor([prompt + completion])
    model.eval().config._attn_implementation = "eager"
    with torch.no_grad():
        logits_TV = model(ids).logits[0, len(prompt) - 1 : -1].double()
    exact_TV = logits_TV[:, : max(tokenizer.get_vocab().values()) + 1].log_softmax(-1)
    for t, token in enumerate(completion):
        entries = slice(scored.offsets_T1[t], scored.offsets_T1[t + 1])
        ids_K = scored.ids_S[entries].tolist()
        assert token in ids_K and len(ids_K) == 64
        assert torch.allclose(torch.from_numpy(scored.logprobs_S[entries]).double(), exact_TV[t, ids_K], atol=1e-4)


def test_stop_ids_are_the_tokenizers_unless_given(student):
    model, tokenizer = student
    assert Rollout(model, tokenizer).stop_ids == stop_ids(tokenizer)
    everything = Rollout(model, tokenizer, stop_ids=range(max(tokenizer.get_vocab().values()) + 1))
    assert all(
        s.finish_reason == "stop" and len(s.completion_ids) == 1 for s in everything.sample(asked(tokenizer), PARAMS)
    )
