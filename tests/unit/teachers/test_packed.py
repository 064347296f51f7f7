"""Packed weights compute the same, only under inference mode, and leave no trace."""

import pytest
import torch
from sampling_models import deepseek, llama, qwen3

from distill import packed

torch.set_num_threads(1)


@pytest.mark.parametrize("rows", [1, 23, 24, 300])
@pytest.mark.parametrize("bias", [False, True])
def test_a_packed_linear_equals_the_plain_one(rows, bias):
    model = torch.nn.Sequential(torch.nn.Linear(40, 72, bias=bias))
    model.config = object()
    inputs = torch.randn(rows, 40)
    wanted = torch.nn.functional.linear(
        inputs.double(), model[0].weight.double(), model[0].bias.double() if bias else None
    )
    undo = packed.pack(model)
    with torch.inference_mode():
        found = model(inputs)
    undo()
    assert torch.allclose(found.double(), wanted, atol=1e-5)


@pytest.mark.parametrize("tokens", [1, 5, 400])
def test_packed_experts_equal_transformers_one_by_one(tokens):
    model = deepseek()
    experts = model.model.layers[2].mlp.experts
    hidden_TE, expert_TK = torch.randn(tokens, 64), torch.rand(tokens, 8).topk(2).indices
    expert_TK %= 7  # one expert gets no token
    weight_TK = torch.rand(tokens, 2)
    model.config._experts_implementation = "eager"
    with torch.inference_mode():
        wanted = experts(hidden_TE, expert_TK, weight_TK)
        undo = packed.pack(model)
        found = experts(hidden_TE, expert_TK, weight_TK)
        assert model.config._experts_implementation == packed.EXPERTS
        undo()
    assert torch.allclose(found, wanted, atol=1e-5)
    assert model.config._experts_implementation == "eager" and not hasattr(experts, "packed")


@pytest.mark.parametrize("build", [deepseek, qwen3, llama])
def test_a_whole_packed_model_gives_its_logits_and_is_restored(build):
    model, ids = build(), torch.arange(20, 80)[None]
    with torch.inference_mode():
        wanted = model(ids).logits
        undo = packed.pack(model)
        assert "forward" in model.lm_head.__dict__
        assert (model(ids).logits - wanted).abs().max() < 1e-4
        undo()
        assert torch.equal(model(ids).logits, wanted)
    assert not any("forward" in module.__dict__ for module in model.modules() if isinstance(module, torch.nn.Linear))


@pytest.mark.parametrize("build", [deepseek, qwen3])
def test_gradients_still_flow_through_a_packed_model(build):
    model = build()
    undo = packed.pack(model)
    model(torch.arange(20, 80)[None]).logits.sum().backward()
    undo()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_other_dtypes_and_large_models_are_left_alone(monkeypatch):
    half, large = qwen3().to(torch.bfloat16), qwen3()
    packed.pack(half)
    monkeypatch.setattr(packed, "LARGEST_BYTES", 1000)
    packed.pack(large)
    for model in (half, large):
        assert "forward" not in model.lm_head.__dict__
