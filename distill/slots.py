"""Keys and values of the rows being sampled, in preallocated slots, and a transformers model that steps over them.

Row a of the batch lives in slot a: left-aligned, its own length, no padding inside. The model's own layers run
unchanged; only the cache they are handed (SlotCache) and the attention of single-token steps are ours.

Shape legend: S slots, A active rows (slots 0..A-1), B prompts of a prefill, P their padded length, L longest row,
H key/value heads, G query heads per key/value head, D head size, V vocabulary.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.cache_utils import Cache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from distill.errors import ModelError
from distill.packed import pack

ATTENTION = "distill_slots"
GROWTH_TOKENS = 64  # capacity of a slot is a multiple of this


class SlotCache(Cache):
    """Per-layer states [S, H, capacity, D] of all slots: K and V, or whatever parts a layer writes.

    A prefill writes row i of its batch to every slot that shares prompt i; a decode step appends one token per active
    row. Layers call `update` as on any transformers cache. States start at zero: a masked position may hold anything
    finite, never a NaN.
    """

    def __init__(self, slots: int):
        super().__init__(layers=[])
        self.slots, self.capacity_tokens, self.longest_tokens = slots, 0, 0
        self.states: list[tuple[Tensor, ...]] = []
        self.prefilling = False
        self._to: tuple[Tensor, Tensor] | None = None

    def begin_prefill(self, slots_N: Tensor, source_N: Tensor, tokens: int) -> None:
        """The next forward's row source_N[i], `tokens` long with its padding, fills slot slots_N[i]."""
        self._reserve(tokens)
        self.prefilling, self.longest_tokens, self._to = True, 0, (slots_N, source_N)

    def begin_decode(self, lengths_A: Tensor, longest_tokens: int) -> None:
        """The next forward appends one token to rows 0..A-1 of lengths_A tokens; the longest gets to longest_tokens."""
        self._reserve(longest_tokens)
        rows_A = torch.arange(len(lengths_A), device=lengths_A.device)
        self.prefilling, self.longest_tokens, self._to = False, longest_tokens, (rows_A, lengths_A)

    def write(self, layer_idx: int, *parts: Tensor) -> tuple[Tensor, ...]:
        """Stores the new tokens [rows, H, new, D]; gives what to attend to: the prompts themselves, or [A, H, L, D]."""
        if layer_idx == len(self.states):
            self.states.append(tuple(self._zeros(part, i == 0 < len(parts) - 1) for i, part in enumerate(parts)))
        state = self.states[layer_idx]
        first, second = self._to
        if self.prefilling:
            for stored, part in zip(state, parts):
                stored[first, :, : part.shape[2]] = part[second]
            return parts
        for stored, part in zip(state, parts):
            stored[first, :, second] = part[:, :, 0]
        return tuple(stored[: len(first), :, : self.longest_tokens] for stored in state)

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args, **kwargs) -> tuple[Tensor, ...]:
        return self.write(layer_idx, key_states, value_states)

    def move(self, to_M: Tensor, from_M: Tensor, tokens: int) -> None:
        """Copies the first `tokens` tokens of slots from_M to slots to_M (disjoint sets)."""
        for part in (part for state in self.states for part in state):
            part[to_M, :, :tokens] = part[from_M, :, :tokens]

    def _reserve(self, tokens: int) -> None:
        if tokens <= self.capacity_tokens:
            return
        wanted = max(tokens, self.capacity_tokens * 3 // 2)
        self.capacity_tokens = -(-wanted // GROWTH_TOKENS) * GROWTH_TOKENS
        for layer_idx, state in enumerate(self.states):
            grown = tuple(self._zeros(part, part.stride(-1) != 1) for part in state)
            for new, old in zip(grown, state):
                new[:, :, : old.shape[2]] = old
            self.states[layer_idx] = grown

    def _zeros(self, like: Tensor, is_key: bool) -> Tensor:
        """[S, H, capacity, D]; on CPU a key's memory runs along the tokens, as the product with a query reads it."""
        shape = (self.slots, like.shape[1], self.capacity_tokens, like.shape[3])
        if is_key and like.device.type == "cpu":
            return like.new_zeros(*shape[:2], shape[3], shape[2]).transpose(2, 3)
        return like.new_zeros(shape)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.longest_tokens

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return max(query_length, self.longest_tokens), 0


def slot_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs
) -> tuple[Tensor, None]:
    """transformers' sdpa, but single-token steps on CPU run as two batched GEMMs: 2-3 times faster there than sdpa."""
    if query.shape[2] != 1 or attention_mask is None or query.device.type != "cpu":
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    rows, heads, length, size = key.shape
    query_XGD = query.reshape(rows * heads, -1, size) * kwargs["scaling"]
    scores_XGL = torch.bmm(query_XGD, key.flatten(0, 1).transpose(1, 2))
    scores_XGL.view(rows, -1, length).add_(attention_mask.view(rows, 1, length))
    weights_XGL = F.softmax(scores_XGL, dim=-1, dtype=torch.float32).to(query.dtype)
    mixed_XGD = torch.bmm(weights_XGL, value.flatten(0, 1))
    return mixed_XGD.view(rows, 1, -1, value.shape[3]), None


ALL_ATTENTION_FUNCTIONS.register(ATTENTION, slot_attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(ATTENTION, sdpa_mask)


class SlotModel:
    """A causal language model of transformers as three operations: prefill prompts, decode one step, score sequences.

    `vocab_size` cuts padded rows off the head: no id the tokenizer lacks can be drawn or get mass.
    """

    def __init__(self, model: nn.Module, vocab_size: int | None = None, cache_class: type[SlotCache] = SlotCache):
        check_supported(model.config)
        self.model = model
        self.device = model.device
        self.vocab_size = min(vocab_size or model.config.vocab_size, model.config.vocab_size)
        self.max_positions = model.config.max_position_embeddings
        self.cache_class, self.cache = cache_class, None

    @contextmanager
    def session(self, slots: int = 0) -> Iterator[None]:
        """Evaluation mode, packed weights and, with slots, a fresh cache; afterwards the model is as it was found.

        A session without slots (scoring) may open inside one with slots.
        """
        if slots and self.cache is not None:
            raise RuntimeError("another sample() of this model is still open: exhaust it or close it first")
        if self.cache is not None:
            yield
            return
        config, training = self.model.config, self.model.training
        attention = config._attn_implementation
        config._attn_implementation = ATTENTION
        self.model.eval()
        unpack = pack(self.model)
        self.cache = self.cache_class(slots) if slots else None
        try:
            yield
        finally:
            self.cache = None
            unpack()
            self.model.train(training)
            config._attn_implementation = attention

    @torch.inference_mode()
    def prefill(self, ids_BP: Tensor, lengths_B: Tensor, slots_N: Tensor, source_N: Tensor) -> Tensor:
        """Logits [B, V] after the last token of each right-padded prompt; slot slots_N[i] gets prompt source_N[i].

        Causal attention keeps the padding, which comes after, out of every real token: no mask is needed.
        """
        self.cache.begin_prefill(slots_N, source_N, ids_BP.shape[1])
        hidden_BPE = self.model.base_model(input_ids=ids_BP, past_key_values=self.cache, use_cache=True)[0]
        last_B1 = (lengths_B - 1).unsqueeze(1)
        return self.logits(hidden_BPE.take_along_dim(last_B1.unsqueeze(-1), dim=1).squeeze(1))

    @torch.inference_mode()
    def decode(self, tokens_A: Tensor, lengths_A: Tensor, longest_tokens: int) -> Tensor:
        """Logits [A, V] after appending tokens_A to rows 0..A-1 of lengths_A tokens; longest_tokens = max + 1."""
        self.cache.begin_decode(lengths_A, longest_tokens)
        visible_AL = torch.arange(longest_tokens, device=self.device) <= lengths_A.unsqueeze(1)
        mask_AL = torch.zeros_like(visible_AL, dtype=self.model.dtype).masked_fill_(~visible_AL, float("-inf"))
        hidden_A1E = self.model.base_model(
            input_ids=tokens_A.unsqueeze(1),
            position_ids=lengths_A.unsqueeze(1),
            attention_mask=mask_AL[:, None, None],
            past_key_values=self.cache,
            use_cache=True,
        )[0]
        return self.logits(hidden_A1E.squeeze(1))

    @torch.inference_mode()
    def move(self, to_M: Tensor, from_M: Tensor, tokens: int) -> None:
        """Slots to_M become copies of slots from_M, whose rows hold at most `tokens` tokens."""
        self.cache.move(to_M, from_M, tokens)

    @torch.inference_mode()
    def hidden(self, ids_BP: Tensor) -> Tensor:
        """Final hidden states [B, P, E] of right-padded sequences, without a cache."""
        return self.model.base_model(input_ids=ids_BP, use_cache=False)[0]

    @torch.inference_mode()
    def logits(self, hidden_NE: Tensor) -> Tensor:
        """fp32 logits [N, V] over the ids that can be drawn."""
        return self.model.get_output_embeddings()(hidden_NE)[:, : self.vocab_size].float()


def check_supported(config) -> None:
    """Raises ModelError for what a slot cache would get silently wrong: windows, recurrent states, rescaled logits."""
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"}:
        raise ModelError(
            "sampling supports full attention in every layer only",
            where=f"{config.model_type} config.layer_types",
            value=sorted(kinds),
            remedy="Use a DeepSeek-V3, Llama, Qwen2 or Qwen3 checkpoint without sliding windows.",
        )
    for name in ("final_logit_softcapping", "logit_scale", "logits_scaling"):
        if getattr(config, name, None) not in (None, 1, 1.0):
            raise ModelError(
                "sampling does not apply this scaling of the logits",
                where=f"{config.model_type} config.{name}",
                value=getattr(config, name),
                remedy="Use a DeepSeek-V3, Llama, Qwen2 or Qwen3 checkpoint.",
            )
