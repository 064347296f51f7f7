"""The sizes of a model as a config states them."""

from typing import Literal

from distill.config_types import Int, Section, setting


class Geometry(Section):
    """The sizes of a model, enough to plan without its checkpoint. The second half is for deepseek_v3 only."""

    family: Literal["deepseek_v3", "qwen2", "qwen3", "llama"] = setting(..., "architecture")
    hidden_size: Int = setting(..., "width of the residual stream", ge=1)
    layers: Int = setting(..., "decoder layers", ge=1)
    heads: Int = setting(..., "query heads", ge=1)
    kv_heads: Int | None = setting(None, "key and value heads; null means heads", ge=1)
    head_dim: Int | None = setting(None, "width of a head; null means hidden_size / heads", ge=1)
    intermediate_size: Int = setting(..., "width of a dense MLP", ge=1)
    vocab_size: Int = setting(..., "rows of the embedding, padding included", unit="tokens", ge=2)
    tie_embeddings: bool = setting(False, "the head is the embedding")
    routed_experts: Int | None = setting(None, "routed experts of a layer", ge=1)
    experts_per_token: Int | None = setting(None, "routed experts a token visits", ge=1)
    moe_intermediate_size: Int | None = setting(None, "width of one expert", ge=1)
    shared_experts: Int | None = setting(None, "experts that every token visits", ge=0)
    dense_layers: Int | None = setting(None, "first layers with a dense MLP", ge=0)
    q_lora_rank: Int | None = setting(None, "rank of the query projection; null means full", ge=1)
    kv_lora_rank: Int | None = setting(None, "rank of the latent key-value cache", ge=1)
    qk_rope_head_dim: Int | None = setting(None, "rotary part of a key head", ge=1)
    qk_nope_head_dim: Int | None = setting(None, "part of a key head without position", ge=1)
    v_head_dim: Int | None = setting(None, "width of a value head", ge=1)
    fp8_experts: bool = setting(False, "routed experts are stored in block-scaled FP8, as R1's are")
