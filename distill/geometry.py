"""Parameters, floating-point operations and cache of a model from its sizes alone.

A matrix of n parameters costs 2n operations a token forward; the causal attention of a token over a context of c tokens
costs 2c operations for each number of its keys and each of its values.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from distill.config import Geometry
from distill.errors import ModelError

FAMILIES = ("deepseek_v3", "qwen2", "qwen3", "llama")

# Geometry's name -> the name in a checkpoint's config.json
_CHECKPOINT_NAMES = {
    "hidden_size": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "intermediate_size": "intermediate_size",
    "vocab_size": "vocab_size",
    "tie_embeddings": "tie_word_embeddings",
}
_MOE_NAMES = {
    "routed_experts": "n_routed_experts",
    "experts_per_token": "num_experts_per_tok",
    "moe_intermediate_size": "moe_intermediate_size",
    "shared_experts": "n_shared_experts",
    "dense_layers": "first_k_dense_replace",
    "q_lora_rank": "q_lora_rank",
    "kv_lora_rank": "kv_lora_rank",
    "qk_rope_head_dim": "qk_rope_head_dim",
    "qk_nope_head_dim": "qk_nope_head_dim",
    "v_head_dim": "v_head_dim",
}


@dataclass(frozen=True)
class Parameters:
    """Counts of parameters. `active` are those that one token uses, the whole embedding table counted among them."""

    total: int
    active: int
    routed: int  # in routed experts, of total
    embedding: int  # looked up, not multiplied; 0 when the head is the embedding
    cut: int  # of total, in matrices of attention, dense MLPs and shared experts that tensor parallelism divides
    low_rank: int  # of total, in projections into MLA's latents, which every rank holds whole

    @property
    def whole(self) -> int:
        """What every rank holds whole and in full precision: embedding, head, norms, routers."""
        return self.total - self.routed - self.cut - self.low_rank

    @property
    def multiplied(self) -> int:
        """Parameters that one token is multiplied with."""
        return self.active - self.embedding


def head_dim(g: Geometry) -> int:
    return g.head_dim or g.hidden_size // g.heads


def kv_heads(g: Geometry) -> int:
    return g.kv_heads or g.heads


def is_mla(g: Geometry) -> bool:
    return g.family == "deepseek_v3"


def parameters(g: Geometry) -> Parameters:
    """All parameters of the model without a multi-token-prediction module (R1's released files add one of 11.5B)."""
    h, table = g.hidden_size, g.vocab_size * g.hidden_size
    rest = g.layers * (_attention(g) + 2 * h) + h + table * (1 if g.tie_embeddings else 2)
    embedding, norms, low_rank = 0 if g.tie_embeddings else table, _attention_norms(g), _low_rank(g)
    cut = g.layers * (_attention(g) - norms - low_rank)
    if not is_mla(g):
        mlps = g.layers * 3 * h * g.intermediate_size
        return Parameters(rest + mlps, rest + mlps, 0, embedding, cut + mlps, 0)
    moe_layers, expert = g.layers - g.dense_layers, 3 * h * g.moe_intermediate_size
    router = h * g.routed_experts + g.routed_experts  # the correction bias too
    mlps = g.dense_layers * 3 * h * g.intermediate_size + moe_layers * g.shared_experts * expert
    rest += mlps + moe_layers * router
    routed = moe_layers * g.routed_experts * expert
    active = rest + moe_layers * g.experts_per_token * expert
    return Parameters(rest + routed, active, routed, embedding, cut + mlps, g.layers * low_rank)


def _attention(g: Geometry) -> int:
    h, heads = g.hidden_size, g.heads
    if is_mla(g):
        q_width = heads * (g.qk_nope_head_dim + g.qk_rope_head_dim)
        q = h * g.q_lora_rank + g.q_lora_rank + g.q_lora_rank * q_width if g.q_lora_rank else h * q_width
        kv_a = h * (g.kv_lora_rank + g.qk_rope_head_dim) + g.kv_lora_rank
        return q + kv_a + g.kv_lora_rank * heads * (g.qk_nope_head_dim + g.v_head_dim) + heads * g.v_head_dim * h
    d, kv = head_dim(g), kv_heads(g)
    extra = {"qwen2": (heads + 2 * kv) * d, "qwen3": 2 * d}.get(g.family, 0)  # biases of q, k, v; norms of q, k
    return h * d * (heads + 2 * kv) + heads * d * h + extra


def _attention_norms(g: Geometry) -> int:
    """Of _attention, what is no matrix and not divided."""
    if is_mla(g):
        return (g.q_lora_rank or 0) + g.kv_lora_rank
    return 2 * head_dim(g) if g.family == "qwen3" else 0


def _low_rank(g: Geometry) -> int:
    """Of _attention, the projections into MLA's latents."""
    if not is_mla(g):
        return 0
    return g.hidden_size * ((g.q_lora_rank or 0) + g.kv_lora_rank + g.qk_rope_head_dim)


def layer_parameters(g: Geometry) -> int:
    """Parameters of one dense decoder layer, the unit that ZeRO-3 gathers."""
    return _attention(g) + 2 * g.hidden_size + 3 * g.hidden_size * g.intermediate_size


def forward_flops(g: Geometry, context_tokens: float, *, absorbed: bool = False) -> float:
    """Operations of one token's forward pass that attends to `context_tokens`; for a sequence of T, the mean is T / 2.

    `absorbed`: MLA decodes in the latent space (keys of kv_lora_rank + rope), dearer a token than expanded heads.
    """
    if is_mla(g) and absorbed:
        width = g.heads * (2 * g.kv_lora_rank + g.qk_rope_head_dim)
    elif is_mla(g):
        width = g.heads * (g.qk_nope_head_dim + g.qk_rope_head_dim + g.v_head_dim)
    else:
        width = 2 * g.heads * head_dim(g)
    return 2.0 * parameters(g).multiplied + 2.0 * g.layers * width * context_tokens


def train_flops(g: Geometry, seq_tokens: float, *, frozen: bool = False) -> float:
    """Operations of one token of a training sequence: forward and twice that backward; recomputation is not counted.

    frozen: under an adapter the weights have no gradient, so that a backward pass takes one product of each, not two.
    """
    return 3 * forward_flops(g, seq_tokens / 2) - frozen * forward_flops(g, 0)


def cache_bytes_per_token(g: Geometry, element_bytes: int = 2, tensor_parallel: int = 1) -> float:
    """Key-value cache of one token on one GPU. A latent cache is whole on every GPU; heads are divided, down to one."""
    if is_mla(g):
        return g.layers * (g.kv_lora_rank + g.qk_rope_head_dim) * element_bytes
    return g.layers * 2 * max(1, kv_heads(g) / tensor_parallel) * head_dim(g) * element_bytes


def read_geometry(folder: str | Path, setting: str) -> Geometry:
    """The geometry of a checkpoint folder, from its config.json; ModelError (naming `setting`) if it has none."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        remedy = f"Write {setting.rsplit('.', 1)[0]}.geometry into the config, or give a folder that is here."
        raise ModelError(f"{setting} is {folder}, whose sizes are not known: there is no {path}", remedy=remedy)
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        family = found["model_type"]
        if family not in FAMILIES:
            raise ModelError(f"{path} has model_type {family}", remedy=f"Supported are {', '.join(FAMILIES)}.")
        names = _CHECKPOINT_NAMES | (_MOE_NAMES if family == "deepseek_v3" else {})
        sizes = {ours: found[theirs] for ours, theirs in names.items() if found.get(theirs) is not None}
        if family == "deepseek_v3":
            sizes.pop("head_dim", None)  # its rotary part, not a head
            sizes["fp8_experts"] = (found.get("quantization_config") or {}).get("quant_method") == "fp8"
        return Geometry.model_validate({"family": family, **sizes})
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{path} cannot be read: {error}", remedy="Copy it again from the model's page.") from error
