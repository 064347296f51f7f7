"""Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, section 2.1) over the latent cache, without expanding it.

A decode step of transformers expands every cached latent to per-head keys and values again. Both expansions are linear,
so they can move to the query and the output side (the paper's "absorbed" form):

    score  = q_nope . (W_uk c) + q_rope . k_rope  =  (W_uk^T q_nope) . c + q_rope . k_rope
    output = sum_j p_j (W_uv c_j)                 =  W_uv (sum_j p_j c_j)

A step then reads R + P numbers per cached token and does no work per token and head beyond the two dot products. A
prefill attends in the expanded form of transformers, which needs fewer operations when every token is new.

Shape legend: A rows, H heads, L cached tokens, R latent rank, P rotary size, N key size without rotary, U value size.
"""

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as deepseek

from distill.slots import SlotCache


class LatentCache(SlotCache):
    """Slots of MLA latents: one part [S, 1, capacity, R + P] a layer, so that one GEMM scores content and position."""

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args, **kwargs
    ) -> tuple[Tensor, Tensor]:
        """Stores the prompts' latents and rotary keys; transformers expands what it gets back."""
        (history,) = self.write(layer_idx, torch.cat((key_states, value_states), dim=-1))
        return history.split((key_states.shape[-1], value_states.shape[-1]), dim=-1)


def install(model: nn.Module) -> None:
    """Makes every attention of a DeepseekV3 model decode in the absorbed form when it is handed a LatentCache."""
    for layer in model.base_model.layers:
        layer.self_attn.forward = partial(latent_attention, layer.self_attn)


def latent_attention(
    attention: deepseek.DeepseekV3Attention,
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    attention_mask: Tensor | None,
    past_key_values: SlotCache | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """Attention output [A, 1, E] of a decode step; any other call goes to transformers' forward."""
    if not isinstance(past_key_values, LatentCache) or past_key_values.prefilling:
        return type(attention).forward(
            attention, hidden_states, position_embeddings, attention_mask, past_key_values, **kwargs
        )
    config, rows = attention.config, hidden_states.shape[0]
    nope_AHN, rope_AHP, new_A1R = _project(attention, hidden_states, position_embeddings)
    (latents,) = past_key_values.write(attention.layer_idx, new_A1R.unsqueeze(1))

    up = attention.kv_b_proj.weight.view(-1, config.qk_nope_head_dim + config.v_head_dim, config.kv_lora_rank)
    up_key_HNR, up_value_HUR = up.split((config.qk_nope_head_dim, config.v_head_dim), dim=1)
    absorbed_AHR = torch.bmm(nope_AHN.transpose(0, 1), up_key_HNR).transpose(0, 1)
    query_AHR = torch.cat((absorbed_AHR, rope_AHP), dim=-1) * attention.scaling
    latents_ALR = latents.squeeze(1)
    scores_AHL = torch.baddbmm(attention_mask.view(rows, 1, -1), query_AHR, latents_ALR.transpose(1, 2))
    weights_AHL = F.softmax(scores_AHL, dim=-1, dtype=torch.float32).to(query_AHR.dtype)
    mixed_AHR = torch.bmm(weights_AHL, latents_ALR[..., : config.kv_lora_rank])
    values_AHU = torch.bmm(mixed_AHR.transpose(0, 1), up_value_HUR.transpose(1, 2)).transpose(0, 1)
    return attention.o_proj(values_AHU.reshape(rows, 1, -1)), None


def _project(
    attention: deepseek.DeepseekV3Attention, hidden_A1E: Tensor, position_embeddings: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries [A, H, N] and rotated [A, H, P] of one new token a row, and its cache entry [A, 1, R + P]."""
    config, rows = attention.config, hidden_A1E.shape[0]
    if attention.q_lora_rank is None:
        query = attention.q_proj(hidden_A1E)
    else:
        query = attention.q_b_proj(attention.q_a_layernorm(attention.q_a_proj(hidden_A1E)))
    query_AH1Q = query.view(rows, -1, 1, attention.qk_head_dim)
    nope, rope = query_AH1Q.split((config.qk_nope_head_dim, config.qk_rope_head_dim), dim=-1)
    latent, key_rope = attention.kv_a_proj_with_mqa(hidden_A1E).split(
        (config.kv_lora_rank, config.qk_rope_head_dim), dim=-1
    )
    rotate = deepseek.apply_rotary_pos_emb_interleave if config.rope_interleave else deepseek.apply_rotary_pos_emb
    rope, key_rope = rotate(rope, key_rope.unsqueeze(1), *position_embeddings)
    new_A1R = torch.cat((attention.kv_a_layernorm(latent), key_rope.squeeze(1)), dim=-1)
    return nope.squeeze(2), rope.squeeze(2), new_A1R
