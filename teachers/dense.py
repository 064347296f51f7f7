"""The forward pass of a dense model (Llama, Qwen2, Qwen3) over paged keys and values, with the machinery of the runner.

What differs from teachers.runner is the attention: query heads in groups that share a key and a value head. A token
leaves its rotated keys and its values in each layer's cache, K heads of each, side by side as the projection gives
them. Split over ranks, each holds some heads and some neurons of the MLP; `summed` adds up what they give.

Shape legend: T new tokens, S tokens attended to, A rows, E hidden size, H query heads, K key-value heads, D head size,
P of them cached before, X = H + 2 K heads of a projection, F MLP width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from teachers.paged import PagePool
from teachers.runner import ROPES, Runner, Segment
from teachers.transfer import to_device
from teachers.weights import fuse

FAMILIES = ("llama", "qwen2", "qwen3")


@dataclass
class DenseLayer:
    """One layer's weights on this rank. `project`: rows of queries, keys and values; `head_norms` [2, D]: Qwen3's."""

    input_norm: Tensor
    project: Tensor
    project_bias: Tensor | None
    head_norms: Tensor | None
    output: Tensor
    output_bias: Tensor | None
    mlp_norm: Tensor
    gate_up: Tensor
    gate_up_bias: Tensor | None
    down: Tensor
    down_bias: Tensor | None


@dataclass
class Past:
    """Where the cached tokens of a prefill lie in the pool, and where they and the new ones belong among all tokens."""

    slots_P: Tensor
    at_P: Tensor
    new_at_T: Tensor


@dataclass
class Ragged:
    """Which tokens of a prefill attend to which: of each sequence, its new tokens and all of its tokens.

    The running sums, with a leading 0, are on the device. past: None if no sequence has one.
    """

    new: list[int]
    whole: list[int]
    new_ends: Tensor
    whole_ends: Tensor
    past: Past | None

    @classmethod
    def of(cls, segments: Sequence[Segment], device: torch.device) -> "Ragged":
        new = [segment.count for segment in segments]
        whole = [segment.past + segment.count for segment in segments]
        ends = [[0, *accumulate(new)], [0, *accumulate(whole)]]
        past = _past(segments, ends[1], device) if new != whole else None
        return cls(new, whole, *to_device(np.array(ends, dtype=np.int32), device), past)


def _past(segments: Sequence[Segment], starts: list[int], device: torch.device) -> Past:
    at_S = np.arange(starts[-1])
    is_new_S = np.concatenate([np.arange(one.past + one.count) >= one.past for one in segments])
    slots_P = torch.cat([one.slots_past for one in segments if one.past])
    return Past(slots_P, to_device(at_S[~is_new_S], device), to_device(at_S[is_new_S], device))


def unsupported(config) -> str | None:
    """Why this model cannot run here, or None."""
    if config.model_type not in FAMILIES:
        return f"model_type {config.model_type}"
    if config.hidden_act != "silu":
        return f"hidden_act {config.hidden_act}"
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"}:
        return f"layer_types {', '.join(sorted(kinds))}"
    rope = config.rope_parameters or {}
    if (kind := rope.get("rope_type", "default")) not in ROPES:
        return f"rope_type {kind}"
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        return f"partial_rotary_factor {rope['partial_rotary_factor']}"
    size = head_size(config)
    if size % 8 or not 16 <= size <= 256:
        return f"head_dim {size}: no multiple of 8 from 16 to 256"
    return None


def head_size(config) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


class DenseRunner(Runner):
    """Prefill, decode and logits of a dense model, whole or one rank's part of it."""

    def _sizes(self) -> int:
        attention = self.model.base_model.layers[0].self_attn
        self.size = head_size(self.config)
        self.query_heads, self.kv_heads = (len(p.weight) // self.size for p in (attention.q_proj, attention.k_proj))
        return 2 * self.kv_heads * self.size

    def _layer(self, layer: nn.Module) -> DenseLayer:
        attention, mlp = layer.self_attn, layer.mlp
        norms = _stacked([attention.q_norm, attention.k_norm]) if hasattr(attention, "q_norm") else None
        return DenseLayer(
            layer.input_layernorm.weight,
            *fuse([attention.q_proj, attention.k_proj, attention.v_proj]),
            norms,
            attention.o_proj.weight,
            attention.o_proj.bias,
            layer.post_attention_layernorm.weight,
            *fuse([mlp.gate_proj, mlp.up_proj]),
            mlp.down_proj.weight,
            mlp.down_proj.bias,
        )

    @torch.inference_mode()
    def prefill(
        self, ids_T: Tensor, positions_T: Tensor, segments: list[Segment], pool: PagePool | None, slots_T: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """As Runner's; all sequences attend in one call."""
        self.begin_prefill(len(ids_T))
        ragged = Ragged.of(segments, self.device)
        attend = lambda i, layer, x_TE: self._attend_prefill(i, layer, x_TE, positions_T, ragged, pool, slots_T)  # noqa: E731
        return self._run(ids_T, attend, self.everyone)

    def _mlp(self, layer: DenseLayer, x_TE: Tensor, active_1: Tensor) -> tuple[Tensor, None]:
        hidden_TF = self.ops.silu_mul(F.linear(x_TE, layer.gate_up, layer.gate_up_bias))
        return self.summed(hidden_TF, layer.down, layer.down_bias), None

    def _project(self, index, layer: DenseLayer, x_TE: Tensor, positions_T, slots_T, pool) -> tuple[Tensor, Tensor]:
        """Queries [T, H, D], and keys and values [T, 2, K, D], normed and rotated; the latter are in the pool too."""
        heads_TXD = F.linear(x_TE, layer.project, layer.project_bias).unflatten(1, (-1, self.size))
        pages = None if pool is None else pool.layer(index)
        self.ops.rotate_heads(
            heads_TXD, self.kv_heads, positions_T, slots_T, self.rope_tables, layer.head_norms, self.eps, pages
        )
        return heads_TXD[:, : self.query_heads], heads_TXD[:, self.query_heads :].unflatten(1, (2, self.kv_heads))

    def _attend_decode(self, index, layer, x_AE, lengths_A, slots_A, tables_AG, pool) -> Tensor:
        query_AHD, _ = self._project(index, layer, x_AE, lengths_A, slots_A, pool)
        mixed_AHD = self.ops.gqa_decode(query_AHD, pool.layer(index), tables_AG, lengths_A, self.kv_heads, self.scale)
        return self.summed(mixed_AHD.flatten(1), layer.output, layer.output_bias)

    def _attend_prefill(self, index, layer, x_TE, positions_T, ragged, pool, slots_T) -> Tensor:
        query_THD, entries = self._project(index, layer, x_TE, positions_T, slots_T, pool)
        if ragged.past:
            new, entries = entries, entries.new_empty(sum(ragged.whole), *entries.shape[1:])
            entries[ragged.past.new_at_T] = new
            entries.flatten(1)[ragged.past.at_P] = pool.layer(index).flatten(0, 1)[ragged.past.slots_P]
        key_SKD, value_SKD = entries.unbind(1)
        mixed_THD = self.ops.attend_ragged(query_THD, key_SKD, value_SKD, ragged, self.scale)
        return self.summed(mixed_THD.flatten(1), layer.output, layer.output_bias)


def _stacked(norms: list[nn.Module]) -> Tensor:
    """Their weights [norms, D]; the modules' own become views of it."""
    weight = torch.stack([norm.weight.data for norm in norms])
    for norm, part in zip(norms, weight):
        norm.weight.data = part
    return weight
