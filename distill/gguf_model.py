"""What of a student llama.cpp can hold: its sizes, its rotary positions, and the way its tokenizer cuts text.

A wrong name for the way text is cut is no error in llama.cpp: it then cuts text otherwise than in training, and the
model is quietly worse. So whatever is not known to be the same is refused. No weight is read here, and the extra `gguf`
is not needed.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill.checkpoints import check_checkpoint
from distill.errors import ModelError
from distill.tokens import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# How llama.cpp cuts text before BPE: the pattern of tokenizer.json -> (its name there, whether a piece that is in the
# vocabulary is taken whole without looking at the merges).
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_PRE = {
    _WORDS + r"\p{N}" + _REST: ("qwen2", False),
    _WORDS + r"\p{N}{1,3}" + _REST: ("llama-bpe", True),
}

# Names of a layer's tensors: transformers -> llama.cpp.
_LAYER = {
    "input_layernorm.weight": "attn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
}
_BIASES = {f"self_attn.{x}_proj.bias": f"attn_{x}.bias" for x in "qkv"}
_NORMS = {f"self_attn.{x}_norm.weight": f"attn_{x}_norm.weight" for x in "qk"}
HEAD = "lm_head.weight"


@dataclass(frozen=True)
class Shape:
    """The sizes of a student that llama.cpp asks for. rope_factors: divisors of the rotary frequencies, or None."""

    arch: str
    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    positions: int
    rows: int
    tied: bool
    norm_eps: float
    rope_theta: float
    rope_factors: tuple[float, ...] | None

    def names(self) -> dict[str, str]:
        """Every tensor of this student: name in the checkpoint -> name in the file, in the order of the layers."""
        layer = _LAYER | {"qwen2": _BIASES, "qwen3": _NORMS, "llama": {}}[self.arch]
        names = {"model.embed_tokens.weight": "token_embd.weight"}
        for i in range(self.layers):
            names |= {f"model.layers.{i}.{theirs}": f"blk.{i}.{ours}" for theirs, ours in layer.items()}
        return names | {"model.norm.weight": "output_norm.weight"} | ({} if self.tied else {HEAD: "output.weight"})


def check_exportable(folder: str | Path) -> None:
    """Returns if llama.cpp can hold this model and cut text as its tokenizer does; reads no weight.

    Errors: ModelError for another architecture, another kind of positions, or a tokenizer llama.cpp does not know.
    """
    read_shape(folder)
    pre_tokenizer(load_tokenizer(folder), str(folder))


def read_shape(folder: str | Path) -> Shape:
    """The sizes in config.json; ModelError for what llama.cpp would compute otherwise, or a size that is not there."""
    config = check_checkpoint(folder)
    where = str(Path(folder) / "config.json")
    arch = {"Qwen2ForCausalLM": "qwen2", "Qwen3ForCausalLM": "qwen3", "LlamaForCausalLM": "llama"}.get(
        (config.get("architectures") or [None])[0]
    )
    rope = config.get("rope_parameters") or {
        "rope_theta": config.get("rope_theta"), **(config.get("rope_scaling") or {})
    }  # fmt: skip
    rope_type = rope.get("rope_type") or rope.get("type") or "default"
    for what, value, wrong in (
        ("this architecture is not written as GGUF", config.get("architectures"), arch is None),
        ("llama.cpp computes SwiGLU with silu only", config.get("hidden_act"), config.get("hidden_act") != "silu"),
        ("sliding windows are not written as GGUF", True, config.get("use_sliding_window")),
        ("quantised weights are not written as GGUF", True, config.get("quantization_config")),
        ("these rotary positions are not written as GGUF", rope_type, rope_type not in _ROPE.get(arch, ())),
        ("partly rotary heads are not written as GGUF", True, (rope.get("partial_rotary_factor") or 1) != 1),
    ):
        if wrong:
            remedy = "Set publish.gguf: false; GGUF is written for dense Qwen2, Qwen3 and Llama students."
            raise ModelError(what, where=where, value=value, remedy=remedy)
    hidden, heads = _size(config, "hidden_size", where), _size(config, "num_attention_heads", where)
    head_dim = _size(config, "head_dim", where) if arch == "qwen3" else config.get("head_dim") or hidden // heads
    return Shape(
        arch=arch,
        layers=_size(config, "num_hidden_layers", where),
        hidden=hidden,
        ffn=_size(config, "intermediate_size", where),
        heads=heads,
        kv_heads=_size(config, "num_key_value_heads", where),
        head_dim=head_dim,
        positions=_size(config, "max_position_embeddings", where),
        rows=_size(config, "vocab_size", where),
        tied=bool(config.get("tie_word_embeddings")),
        norm_eps=_size(config, "rms_norm_eps", where),
        rope_theta=_size(rope, "rope_theta", where),
        rope_factors=tuple(rope_factors(rope, head_dim)) if rope_type == "llama3" else None,
    )


_ROPE = {"qwen2": ("default",), "qwen3": ("default",), "llama": ("default", "llama3")}


def _size(config: dict[str, Any], name: str, where: str) -> Any:
    if config.get(name) is None:
        raise ModelError(f"{name} is missing", where=where, remedy="Save the model again with save_pretrained.")
    return config[name]


def rope_factors(rope: dict[str, Any], head_dim: int) -> list[float]:
    """Divisors [head_dim / 2] of the rotary frequencies of Llama 3.1's long context, as llama.cpp takes them.

    A frequency whose wavelength is below original_max_position_embeddings / high_freq_factor is kept, one above
    original_max_position_embeddings / low_freq_factor is divided by `factor`, and between them the frequency itself
    goes linearly from one to the other in the number of turns over the original context.
    """
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    context = rope["original_max_position_embeddings"]
    divisors = []
    for i in range(head_dim // 2):
        turns = context * rope["rope_theta"] ** (-2 * i / head_dim) / (2 * math.pi)
        kept = min(1.0, max(0.0, (turns - low) / (high - low)))
        divisors.append(1 / (kept + (1 - kept) / rope["factor"]))
    return divisors


def pre_tokenizer(tok: PreTrainedTokenizerFast, where: str) -> str:
    """llama.cpp's name for how this tokenizer cuts text: "qwen2" or "llama-bpe".

    The pattern must be the known one, letter for letter, and BPE plain; where llama.cpp looks at merges for a piece
    that tokenizer.json takes whole (or the other way round), every such piece must come out the same.
    Unicode normalisation is not part of the format: text that is not NFC is cut as it stands.
    """
    state = json.loads(tok.backend_tokenizer.to_str())
    steps = (state["pre_tokenizer"] or {}).get("pretokenizers") or [state["pre_tokenizer"] or {}]
    pattern = (steps[0].get("pattern") or {}).get("Regex")
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    as_bytes = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
    known = (
        len(steps) == 2
        and pattern in _PRE
        and steps[0] == split
        and all(steps[1].get(key) == value for key, value in as_bytes.items())
    )
    if not known:
        raise _unknown("llama.cpp has no name for the way this tokenizer cuts text", pattern or steps[0], where)
    if (state["normalizer"] or {}).get("type") not in (None, "NFC"):
        raise _unknown("llama.cpp does not apply this normalizer", state["normalizer"], where)
    model = state["model"]
    plain = model["type"] == "BPE" and not any(
        model.get(key) for key in ("dropout", "byte_fallback", "continuing_subword_prefix", "end_of_word_suffix")
    )
    if not plain:
        raise _unknown("llama.cpp knows plain byte-level BPE only", model["type"], where)
    if marked := [token["content"] for token in state["added_tokens"] if token["lstrip"] or token["rstrip"]]:
        raise _unknown("llama.cpp does not strip spaces around added tokens", marked[:3], where)
    name, takes_whole = _PRE[pattern]
    if bool(model.get("ignore_merges")) != takes_whole and (piece := _first_not_merged(state)):
        raise _unknown(f"llama.cpp ({name}) cuts this piece of the vocabulary otherwise", piece, where)
    return name


def _unknown(what: str, value: object, where: str) -> ModelError:
    remedy = "Set publish.gguf: false: llama.cpp would cut text otherwise than in training."
    return ModelError(what, where=f"{where}: tokenizer.json", value=value, remedy=remedy)


def _first_not_merged(state: dict[str, Any]) -> str | None:
    """The first piece of the vocabulary that the merges alone do not build. ignore_merges matters for such only."""
    from tokenizers import Tokenizer

    added = {token["content"] for token in state["added_tokens"]}
    merging = Tokenizer.from_str(json.dumps(state | {"model": state["model"] | {"ignore_merges": False}})).model
    pieces = (piece for piece in state["model"]["vocab"] if piece not in added)
    return next((piece for piece in pieces if len(merging.tokenize(piece)) != 1), None)
