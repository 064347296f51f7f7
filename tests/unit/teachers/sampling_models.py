"""Small real models with random weights and peaked distributions, and ways to run them through the generate loop."""

import numpy as np
import torch
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from distill.generate import Generator
from distill.records import SampleRequest
from distill.slots import SlotCache, SlotModel
from teachers.attention import LatentCache, install

VOCAB = 700
STOPS = list(range(12))
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "original_max_position_embeddings": 64,
}


def _peaked(model):
    """Weights of order one and a final norm that spreads the logits: entropies like a trained model's."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.normal_(0, 0.08, generator=generator)
        model.base_model.norm.weight.fill_(12.0)
    return model.eval()


def deepseek(**changes) -> DeepseekV3ForCausalLM:
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 96,
        "moe_intermediate_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 1,
        "q_lora_rank": 24,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 12,
        "v_head_dim": 10,
        "first_k_dense_replace": 1,
        "max_position_embeddings": 256,
        "num_nextn_predict_layers": 0,
        "eos_token_id": None,
        "bos_token_id": None,
    }
    return _peaked(DeepseekV3ForCausalLM(DeepseekV3Config(**sizes | changes)))


DENSE = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "eos_token_id": None,
    "bos_token_id": None,
}


def qwen2(**changes) -> Qwen2ForCausalLM:
    return _peaked(Qwen2ForCausalLM(Qwen2Config(**DENSE | changes)))


def qwen3(**changes) -> Qwen3ForCausalLM:
    return _peaked(Qwen3ForCausalLM(Qwen3Config(**DENSE | {"tie_word_embeddings": True} | changes)))


def llama(**changes) -> LlamaForCausalLM:
    return _peaked(LlamaForCausalLM(LlamaConfig(**DENSE | changes)))


def slot_model(model) -> SlotModel:
    if model.config.model_type == "deepseek_v3":
        install(model)
        return SlotModel(model, cache_class=LatentCache)
    return SlotModel(model, cache_class=SlotCache)


def generator(model, slots: int, stops=STOPS) -> Generator:
    return Generator(slot_model(model), slots, stops)


def requests(prompts: int, samples: int, seed: int = 0) -> list[SampleRequest]:
    rng = np.random.default_rng(seed)
    texts = [tuple(rng.integers(20, VOCAB, rng.integers(1, 40)).tolist()) for _ in range(prompts)]
    return [
        SampleRequest(f"p{i}", j, ids, int(rng.integers(1 << 62)))
        for i, ids in enumerate(texts)
        for j in range(samples)
    ]


def as_table(samples) -> dict:
    table = {(s.key, s.sample_index): (s.completion_ids, s.finish_reason) for s in samples}
    return table
