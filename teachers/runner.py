"""The forward pass of DeepSeek-V3 over paged latents, on the weights of a transformers model.

The same arithmetic as transformers' modules with fewer reads and launches: projections of one input run as one product,
additions go with the next norm, a decode step attends in the absorbed form (teachers.attention has the formula) and a
prefill in the expanded one. Tokens of a prefill are one ragged list without padding. Weights are fused once, and the
modules' parameters become views of the fused tensors: nothing is held twice.

A model that ranks hold together runs here too, on the part that teachers.shard left on this rank: teachers.mesh says
who adds up and who exchanges what. Without a mesh none of it happens.

Shape legend: T tokens, A rows, E hidden size, H heads, Q = N + P query size (content, rotary), R latent rank,
L = R + P, U value size, V vocabulary, G pages of a row.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention.bias import causal_lower_right

from teachers import plain
from teachers.mesh import Mesh
from teachers.paged import PagePool
from teachers.weights import Experts, experts_of, fuse, routed

SHARED_BESIDE = 512  # up to this many tokens the shared experts run beside the routed ones, on a second stream
ROPES = ("default", "linear", "yarn", "llama3")  # whose frequencies do not change with the length


@dataclass
class Layer:
    """One layer's weights. `project`: rows of the query (or its low-rank input) and the latent, side by side."""

    input_norm: Tensor
    project: Tensor
    project_bias: Tensor | None
    query_norm: Tensor | None
    query_up: Tensor | None
    latent_norm: Tensor
    expand: Tensor
    output: Tensor
    output_bias: Tensor | None
    mlp_norm: Tensor
    dense: tuple[Tensor, Tensor] | None
    experts: Experts | None


@dataclass
class Segment:
    """New tokens of one sequence in a prefill: `count` of them from `start` of the list, after `slots_past` [past]."""

    start: int
    count: int
    slots_past: Tensor | None = None

    @property
    def past(self) -> int:
        return 0 if self.slots_past is None else len(self.slots_past)


def unsupported(config) -> str | None:
    """Why this model cannot run here, or None."""
    if config.model_type != "deepseek_v3":
        return f"model_type {config.model_type}"
    if config.hidden_act != "silu":
        return f"hidden_act {config.hidden_act}"
    rope = (config.rope_parameters or {}).get("rope_type", "default")
    if rope not in ROPES:
        return f"rope_type {rope}"
    experts, groups = config.n_routed_experts, config.n_group
    rank, rotary = config.kv_lora_rank, config.qk_rope_head_dim
    if any(size & (size - 1) for size in (experts, rank, rotary, groups)) or min(rank, rotary) < 16:
        return (
            f"n_routed_experts {experts}, n_group {groups}, kv_lora_rank {rank}, qk_rope_head_dim {rotary}: not all "
            "powers of two, the last two of 16 or more"
        )
    return None


class Runner:
    """Prefill, decode and logits of a DeepseekV3ForCausalLM. `vocab_size` cuts padded rows off the head.

    mesh: the other ranks that hold the model; all of them make the same passes (Mesh.meet).
    """

    def __init__(self, model: nn.Module, vocab_size: int | None = None, mesh: Mesh | None = None):
        config = model.config
        self.mesh = mesh
        self.model, self.config, self.device, self.dtype = model, config, model.device, model.dtype
        self.ops = plain
        if self.device.type == "cuda":
            from teachers.kernels import ops  # Triton is there where CUDA is

            self.ops = ops
            self.beside = torch.cuda.Stream()
        self.vocab_size = min(vocab_size or config.vocab_size, config.vocab_size)
        self.max_positions = config.max_position_embeddings
        self.entry_size, self.eps = self._sizes(), config.rms_norm_eps
        self.scale = model.base_model.layers[0].self_attn.scaling
        self.embed = model.get_input_embeddings().weight
        self.head, self.final_norm = self._head_part(model.get_output_embeddings().weight), model.base_model.norm.weight
        self.rope_tables = self._rope_tables(model.base_model.rotary_emb)
        self.layers = [self._layer(layer) for layer in model.base_model.layers]
        self.everyone = torch.full((1,), 1 << 30, dtype=torch.int32, device=self.device)

    def _sizes(self) -> int:
        """Takes note of the attention's sizes; the numbers that a token leaves in the cache of each layer."""
        config = self.config
        self.rank, self.rotary = config.kv_lora_rank, config.qk_rope_head_dim
        self.content, self.value_size = config.qk_nope_head_dim, config.v_head_dim
        self.latent_size = self.rank + self.rotary
        return self.latent_size

    def _head_part(self, head_VE: Tensor) -> Tensor:
        """This rank's part of the vocabulary; the last may be short of rows, which are zero."""
        if self.mesh is None or self.mesh.tensor == 1:
            return head_VE
        each = -(-len(head_VE) // self.mesh.tensor)
        part_WE = head_VE[self.mesh.place * each : (self.mesh.place + 1) * each]
        return part_WE if len(part_WE) == each else F.pad(part_WE, (0, 0, 0, each - len(part_WE)))

    def _rope_tables(self, rope: nn.Module) -> tuple[Tensor, Tensor]:
        """cos and sin [positions, P / 2], fp32."""
        positions = torch.arange(self.max_positions, device=self.device, dtype=torch.float32)
        angles = torch.outer(positions, rope.inv_freq.to(self.device, torch.float32))
        return angles.cos() * rope.attention_scaling, angles.sin() * rope.attention_scaling

    def _layer(self, layer: nn.Module) -> Layer:
        attention, mlp = layer.self_attn, layer.mlp
        first = attention.q_proj if attention.q_lora_rank is None else attention.q_a_proj
        project, bias = fuse([first, attention.kv_a_proj_with_mqa])
        experts = experts_of(mlp, self.config, self.mesh) if hasattr(mlp, "experts") else None
        return Layer(
            layer.input_layernorm.weight,
            project,
            bias,
            None if attention.q_lora_rank is None else attention.q_a_layernorm.weight,
            None if attention.q_lora_rank is None else attention.q_b_proj.weight,
            attention.kv_a_layernorm.weight,
            attention.kv_b_proj.weight,
            attention.o_proj.weight,
            attention.o_proj.bias,
            layer.post_attention_layernorm.weight,
            None if experts else (fuse([mlp.gate_proj, mlp.up_proj])[0], mlp.down_proj.weight),
            experts,
        )

    # ---- the whole pass ------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def prefill(
        self, ids_T: Tensor, positions_T: Tensor, segments: list[Segment], pool: PagePool | None, slots_T: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The residual parts of a ragged list of tokens after the last layer, for `finish`; fills slots_T of `pool`."""
        self.begin_prefill(len(ids_T))
        attend = lambda i, layer, x_TE: self._attend_prefill(i, layer, x_TE, positions_T, segments, pool, slots_T)  # noqa: E731
        return self._run(ids_T, attend, self.everyone)

    def begin_prefill(self, tokens: int) -> None:
        """Returns when the ranks that share the experts are about to make a prefill, in which this one has tokens."""
        if self.mesh and self.mesh.shares > 1:
            self.mesh.meet(prefill=tokens)

    @torch.inference_mode()
    def idle(self) -> None:
        """This rank's side of a pass in which it has no token: what its experts answer the others."""
        none_0E = self.embed[:0]
        for layer in self.layers:
            if layer.experts:
                routed(self.ops, self.mesh, layer.experts, none_0E, self.everyone)

    @torch.inference_mode()
    def finish(self, parts: tuple, rows_N: Tensor | None = None, active_1: Tensor | None = None) -> Tensor:
        """Final hidden states [N, E] of these rows of the residual parts."""
        if rows_N is not None:
            parts = tuple(None if part is None else part[rows_N] for part in parts)
        active_1 = self.everyone if active_1 is None else active_1
        return self.ops.add_norm(*parts, active_1, self.final_norm, self.eps)

    @torch.inference_mode()
    def logits(self, hidden_NE: Tensor) -> Tensor:
        """fp32 logits [N, V] over the ids that can be drawn; on a GPU straight from the fp32 sums of the product."""
        if self.device.type == "cuda" and self.dtype != torch.float32:
            logits_NW = torch.mm(hidden_NE, self.head.t(), out_dtype=torch.float32)
        else:
            logits_NW = F.linear(hidden_NE, self.head).float()
        if self.mesh and self.mesh.tensor > 1:
            logits_NW = self.mesh.side_by_side(logits_NW)
        return logits_NW[:, : self.vocab_size]

    @torch.inference_mode()
    def decode(
        self, tokens_A: Tensor, lengths_A: Tensor, tables_AG: Tensor, active_1: Tensor, pool: PagePool
    ) -> Tensor:
        """Logits [A, V] after appending tokens_A to rows of lengths_A cached tokens; rows from active_1 on are idle."""
        return self.logits(self.decode_hidden(tokens_A, lengths_A, tables_AG, active_1, pool))

    @torch.inference_mode()
    def decode_hidden(
        self, tokens_A: Tensor, lengths_A: Tensor, tables_AG: Tensor, active_1: Tensor, pool: PagePool
    ) -> Tensor:
        """As `decode`, the final hidden states [A, E]. Rows may be tokens of one sequence, one after the other."""
        slots_A = self.slots_of(lengths_A, tables_AG, active_1, pool)
        attend = lambda i, layer, x_AE: self._attend_decode(i, layer, x_AE, lengths_A, slots_A, tables_AG, pool)  # noqa: E731
        return self.finish(self._run(tokens_A, attend, active_1), active_1=active_1)

    def slots_of(self, lengths_A: Tensor, tables_AG: Tensor, active_1: Tensor, pool: PagePool) -> Tensor:
        """Where the tokens after lengths_A go, [A]; those of idle rows to page 0."""
        page = (lengths_A // pool.page_tokens).unsqueeze(1)
        slots_A = tables_AG.gather(1, page.long()).squeeze(1).long() * pool.page_tokens + lengths_A % pool.page_tokens
        live_A = torch.arange(len(lengths_A), device=self.device, dtype=torch.int32) < active_1
        return torch.where(live_A, slots_A, 0)

    def _run(self, ids_T: Tensor, attend: Callable, active_1: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        return self._through(enumerate(self.layers), F.embedding(ids_T, self.embed), attend, active_1)

    def _through(self, layers: Iterable[tuple[int, Layer]], residual_TE: Tensor, attend: Callable, active_1: Tensor):
        """The residual parts after layers, each with its place in the pool."""
        delta_TE = experts_TKE = None
        for i, layer in layers:
            x_TE = self.ops.add_norm(residual_TE, delta_TE, experts_TKE, active_1, layer.input_norm, self.eps)
            delta_TE = attend(i, layer, x_TE)
            x_TE = self.ops.add_norm(residual_TE, delta_TE, None, None, layer.mlp_norm, self.eps)
            delta_TE, experts_TKE = self._mlp(layer, x_TE, active_1)
        return residual_TE, delta_TE, experts_TKE

    def _mlp(self, layer: Layer, x_TE: Tensor, active_1: Tensor) -> tuple[Tensor, Tensor | None]:
        """The part for every token, and the K routed parts; their sum belongs to the next norm."""
        if layer.experts is None:
            gate_up, down = layer.dense
            return self.summed(self.ops.silu_mul(F.linear(x_TE, gate_up)), down), None
        experts = layer.experts
        shared = lambda: F.linear(self.ops.silu_mul(F.linear(x_TE, experts.shared_gate_up)), experts.shared_down)  # noqa: E731
        beside = x_TE.is_cuda and len(x_TE) <= SHARED_BESIDE
        if self.mesh:
            return self._mlp_of_ranks(experts, shared, beside, x_TE, active_1)
        chosen_TK, weight_TK = self.ops.route(x_TE, experts.gate, experts.bias, active_1, **experts.router)
        work = self.ops.group(chosen_TK, experts.gate_up)
        if beside:  # not sooner: the choice of experts is on the longer path
            self.beside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.beside):
                shared_TE = shared()
        routed_TKE = self.ops.experts(x_TE, work, weight_TK, experts.gate_up, experts.down)
        if beside:
            torch.cuda.current_stream().wait_stream(self.beside)
        else:
            shared_TE = shared()
        return shared_TE, routed_TKE

    # ---- over ranks ------------------------------------------------------------------------------------------------

    def summed(self, part_TX: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """The product with a weight of which each rank of a tensor group holds some columns."""
        if self.mesh is None or self.mesh.tensor == 1:
            return F.linear(part_TX, weight, bias)
        sum_TE = self.mesh.summed(F.linear(part_TX, weight))
        return sum_TE if bias is None else sum_TE.add_(bias)

    def _mlp_of_ranks(self, experts: Experts, shared: Callable, beside: bool, x_TE, active_1) -> tuple:
        if beside:  # from the start: the exchange of tokens leaves the device idle
            self.beside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.beside):
                shared_TE = shared()
        parts_TPE = routed(self.ops, self.mesh, experts, x_TE, active_1)
        if beside:
            torch.cuda.current_stream().wait_stream(self.beside)
        else:
            shared_TE = shared()
        if self.mesh.tensor > 1:
            return self.mesh.summed(parts_TPE.sum(1).add_(shared_TE)), None
        return shared_TE, parts_TPE

    # ---- attention -----------------------------------------------------------------------------------------------

    def _project(self, layer: Layer, x_TE: Tensor) -> tuple[Tensor, Tensor]:
        """Queries [T, H, Q] and raw cache entries [T, L], not yet rotated."""
        projected_TX = F.linear(x_TE, layer.project, layer.project_bias)
        query, latent_TL = projected_TX[:, : -self.latent_size], projected_TX[:, -self.latent_size :]
        if layer.query_up is not None:
            normed = self.ops.add_norm(query.contiguous(), None, None, None, layer.query_norm, self.eps)
            query = F.linear(normed, layer.query_up)
        return query.unflatten(1, (-1, self.content + self.rotary)), latent_TL

    def _up(self, layer: Layer) -> tuple[Tensor, Tensor]:
        """Expansions of a latent to content keys [H, N, R] and values [H, U, R]."""
        return layer.expand.view(-1, self.content + self.value_size, self.rank).split(
            (self.content, self.value_size), dim=1
        )

    def _attend_decode(self, index, layer, x_AE, lengths_A, slots_A, tables_AG, pool) -> Tensor:
        query_AHQ, latent_AL = self._project(layer, x_AE)
        up_key_HNR, up_value_HUR = self._up(layer)
        rows, heads = query_AHQ.shape[:2]
        absorbed_AHL = query_AHQ.new_empty(rows, heads, self.latent_size)
        content_HAN = query_AHQ[..., : self.content].transpose(0, 1)
        torch.bmm(content_HAN, up_key_HNR, out=absorbed_AHL[..., : self.rank].transpose(0, 1))
        self._rope(layer, query_AHQ, latent_AL, lengths_A, slots_A, absorbed_AHL[..., self.rank :], None, pool, index)
        mixed_AHR = self.ops.mla_decode(absorbed_AHL, pool.layer(index), tables_AG, lengths_A, self.rank, self.scale)
        values_AHU = query_AHQ.new_empty(rows, heads, self.value_size)
        torch.bmm(mixed_AHR.transpose(0, 1), up_value_HUR.transpose(1, 2), out=values_AHU.transpose(0, 1))
        return self.summed(values_AHU.flatten(1), layer.output, layer.output_bias)

    def _attend_prefill(self, index, layer, x_TE, positions_T, segments, pool, slots_T) -> Tensor:
        query_THQ, latent_TL = self._project(layer, x_TE)
        entry_TL = latent_TL.new_empty(latent_TL.shape)
        rotary_THP = query_THQ[..., self.content :]
        self._rope(layer, query_THQ, latent_TL, positions_T, slots_T, rotary_THP, entry_TL, pool, index)
        values = []
        for (count, past), same in groupby(segments, key=lambda s: (s.count, s.past)):
            same = list(same)
            tokens = slice(same[0].start, same[-1].start + count)
            entry_BTL = entry_TL[tokens].unflatten(0, (-1, count))
            if past:
                slots_BT = torch.stack([segment.slots_past for segment in same])
                history_BTL = pool.layer(index).flatten(0, 1)[slots_BT]
                entry_BTL = torch.cat((history_BTL, entry_BTL), dim=1)
            query_BnHQ = query_THQ[tokens].unflatten(0, (-1, count))
            values.append(self._expanded(layer, query_BnHQ, entry_BTL).flatten(0, 1).flatten(1))
        values_TX = values[0] if len(values) == 1 else torch.cat(values)
        return self.summed(values_TX, layer.output, layer.output_bias)

    def _expanded(self, layer: Layer, query_BnHQ: Tensor, entry_BTL: Tensor) -> Tensor:
        """Causal attention [B, n, H, U] of the last n of T tokens, over expanded keys and values."""
        sequences, total = entry_BTL.shape[:2]
        entry_XL, new, heads = entry_BTL.flatten(0, 1), query_BnHQ.shape[1], query_BnHQ.shape[2]
        up_key_HNR, up_value_HUR = self._up(layer)
        key_XHQ = entry_XL.new_empty(len(entry_XL), heads, self.content + self.rotary)
        value_XHU = entry_XL.new_empty(len(entry_XL), heads, self.value_size)
        latent_HXR = entry_XL[:, : self.rank].expand(heads, -1, -1)
        # Expanded straight to where attention reads them, beside the rotary part that all heads share.
        torch.bmm(latent_HXR, up_key_HNR.transpose(1, 2), out=key_XHQ[..., : self.content].transpose(0, 1))
        torch.bmm(latent_HXR, up_value_HUR.transpose(1, 2), out=value_XHU.transpose(0, 1))
        self.ops.spread(entry_XL[:, self.rank :], key_XHQ[..., self.content :])
        mask = None if new == total else causal_lower_right(new, total)
        values_BHnU = F.scaled_dot_product_attention(
            query_BnHQ.transpose(1, 2),
            key_XHQ.unflatten(0, (sequences, total)).transpose(1, 2),
            value_XHU.unflatten(0, (sequences, total)).transpose(1, 2),
            attn_mask=mask,
            is_causal=mask is None,
            scale=self.scale,
        )
        return values_BHnU.transpose(1, 2)

    def _rope(self, layer, query_THQ, latent_TL, positions_T, slots_T, target_THP, entry_TL, pool, index) -> None:
        self.ops.rope_and_cache(
            query_THQ,
            latent_TL,
            positions_T,
            slots_T,
            self.rope_tables,
            layer.latent_norm,
            self.eps,
            target_THP,
            entry_TL,
            None if pool is None else pool.layer(index),
            interleaved=self.config.rope_interleave,
        )
