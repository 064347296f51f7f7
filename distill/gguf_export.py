"""A finished student as one GGUF file, the format of llama.cpp: weights, tokenizer, chat template and stop tokens.

Tensors are copied one at a time, so the memory needed is that of the largest. Needs the extra `gguf`. What llama.cpp
cannot hold is refused by `distill.gguf_model`; what was written is run by `distill.gguf_check`.
"""

from __future__ import annotations

import json
import math
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from distill.checkpoints import read_header
from distill.errors import ConfigError, ModelError, StoreError
from distill.gguf_model import HEAD, Shape, pre_tokenizer, read_shape
from distill.tokens import end_id, load_tokenizer

if TYPE_CHECKING:
    import numpy as np
    from gguf import GGUFWriter
    from torch import Tensor
    from transformers import PreTrainedTokenizerFast

Weights = Literal["auto", "f32", "f16", "bf16"]
PACKAGES = ("gguf", "xllamacpp")  # the writer, and llama.cpp itself for the check
_STORED = {"F32": "f32", "F16": "f16", "BF16": "bf16"}


def require_packages(where: str = "publish.gguf") -> None:
    """Returns if a GGUF file can be written and checked here; ConfigError naming the extra when it is not installed."""
    if missing := [name for name in PACKAGES if find_spec(name) is None]:
        raise ConfigError(
            "a GGUF file is asked for, and the packages that write and run it are not installed",
            where=where,
            value=missing,
            remedy='Run pip install -c constraints.txt -e ".[gguf]", or set publish.gguf: false.',
        )


def export_gguf(folder: str | Path, out: str | Path, *, name: str, weights: Weights = "auto") -> dict[str, Any]:
    """Writes `out` from a Hugging Face folder. Returns {"bytes", "tensors", "weights", "pre"}.

    name: the model's name in the file. weights: how matrices are stored; auto keeps what the checkpoint has, bit for
    bit. Vectors (norms, biases) are float32, which llama.cpp requires. The file is written in place: give a temporary
    name where a half-written one could be taken for a whole one.
    Errors: those of gguf_model.check_exportable; ModelError for missing or further tensors and for values that float16
    cannot hold; StoreError when the disk is full; ConfigError without the extra.
    """
    require_packages(where=str(out))
    folder, out = Path(folder), Path(out)
    shape, tok = read_shape(folder), load_tokenizer(folder)
    pre = pre_tokenizer(tok, str(folder))
    found = _tensors(folder, shape)
    kind = _kind(weights, [dtype for _, dtype, size in found.values() if len(size) > 1], folder)
    from gguf import GGUFWriter

    writer = GGUFWriter(None, shape.arch)
    _add_shape(writer, shape, name, kind)
    _add_tokenizer(writer, tok, pre, shape.rows)
    try:
        _write(writer, out, shape, found, kind)
    except OSError as error:
        raise StoreError(
            f"the GGUF file cannot be written: {error.strerror}", where=str(out), remedy="Free space, then run again."
        ) from error
    finally:
        writer.close()
    return {"bytes": out.stat().st_size, "tensors": len(found), "weights": kind, "pre": pre}


def _tensors(folder: Path, shape: Shape) -> dict[str, tuple[Path, str, list[int]]]:
    """Checkpoint name -> (file, dtype, sizes) of exactly the tensors that the shape promises, in file order."""
    held = {
        name: (file, tensor["dtype"], tensor["shape"])
        for file in sorted(folder.glob("*.safetensors"))
        for name, tensor in read_header(file).items()
    }
    if shape.tied:
        held.pop(HEAD, None)  # the embedding again
    names = shape.names()
    wrong = sorted(names.keys() ^ held.keys())
    if wrong:
        raise ModelError(
            f"the weights are not those of a {shape.arch} model that llama.cpp knows: {len(wrong)} tensors missing or "
            "unknown to it",
            where=str(folder),
            value=wrong[0],
            remedy="Merge adapters into the weights and save the model again, or set publish.gguf: false.",
        )
    return {name: held[name] for name in names}


def _kind(weights: Weights, stored: list[str], folder: Path) -> str:
    if odd := sorted(set(stored) - _STORED.keys()):
        raise ModelError("weights of this type are not written as GGUF", where=str(folder), value=odd)
    if weights != "auto":
        return weights
    kinds = {_STORED[dtype] for dtype in stored}
    return kinds.pop() if len(kinds) == 1 else "f32"


def _add_shape(writer: GGUFWriter, shape: Shape, name: str, kind: str) -> None:
    from gguf import LlamaFileType

    files = {"f32": LlamaFileType.ALL_F32, "f16": LlamaFileType.MOSTLY_F16, "bf16": LlamaFileType.MOSTLY_BF16}
    writer.add_type("model")
    writer.add_name(name)
    writer.add_file_type(files[kind])
    writer.add_context_length(shape.positions)
    writer.add_embedding_length(shape.hidden)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.ffn)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_rope_freq_base(shape.rope_theta)
    writer.add_layer_norm_rms_eps(shape.norm_eps)
    writer.add_vocab_size(shape.rows)


def _add_tokenizer(writer: GGUFWriter, tok: PreTrainedTokenizerFast, pre: str, rows: int) -> None:
    from gguf import TokenType

    state = json.loads(tok.backend_tokenizer.to_str())
    pieces = [f"<|unused_row_{i}|>" for i in range(rows)]
    types = [TokenType.UNUSED] * rows
    for piece, index in tok.get_vocab().items():
        pieces[index], types[index] = piece, TokenType.NORMAL
    for token in state["added_tokens"]:
        types[token["id"]] = TokenType.CONTROL if token["special"] else TokenType.USER_DEFINED
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in state["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")  # llama.cpp's word for byte-level BPE
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(pieces)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    if tok.bos_token_id is not None:
        writer.add_bos_token_id(tok.bos_token_id)
    if tok.pad_token_id is not None:
        writer.add_pad_token_id(tok.pad_token_id)
    # Both end a completion there; without the second the end of a turn would not stop a base model's tokenizer.
    writer.add_eos_token_id(end_id(tok) if tok.eos_token_id is None else tok.eos_token_id)
    writer.add_eot_token_id(end_id(tok))
    writer.add_add_bos_token(tok.bos_token_id is not None and tok("a").input_ids[:1] == [tok.bos_token_id])
    writer.add_chat_template(tok.chat_template)


def _write(
    writer: GGUFWriter, out: Path, shape: Shape, found: dict[str, tuple[Path, str, list[int]]], kind: str
) -> None:
    import numpy as np
    from gguf import GGMLQuantizationType
    from safetensors import safe_open

    names, types = shape.names(), {each: GGMLQuantizationType[each.upper()] for each in _STORED.values()}
    factors = [] if shape.rope_factors is None else [np.array(shape.rope_factors, dtype=np.float32)]
    for each in factors:
        writer.add_tensor_info("rope_freqs.weight", each.shape, each.dtype, each.nbytes)
    for name, (_, _, size) in found.items():
        as_kind = kind if len(size) > 1 else "f32"
        item_bytes = 4 if as_kind == "f32" else 2
        writer.add_tensor_info(
            names[name], size, np.dtype(np.float32), math.prod(size) * item_bytes, raw_dtype=types[as_kind]
        )
    writer.write_header_to_file(out)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for each in factors:
        writer.write_tensor_data(each)
    opened = {file: safe_open(file, "pt") for file in {file for file, _, _ in found.values()}}
    for name, (file, _, size) in found.items():
        tensor = _reordered(opened[file].get_tensor(name), name, shape)
        writer.write_tensor_data(_converted(tensor, kind if len(size) > 1 else "f32", f"{file}: {name}"))
    writer.flush()


def _reordered(tensor: Tensor, name: str, shape: Shape) -> Tensor:
    """Rows of Llama's Q and K: transformers turns row i of a head with row i + D/2, llama.cpp 2i with 2i + 1."""
    heads = {"q_proj.weight": shape.heads, "k_proj.weight": shape.kv_heads}.get(".".join(name.split(".")[-2:]))
    if shape.arch != "llama" or heads is None:
        return tensor
    return tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def _converted(tensor: Tensor, kind: str, where: str) -> np.ndarray:
    import torch

    if kind == "f32":
        return tensor.float().contiguous().numpy()
    if kind == "bf16":
        return tensor.to(torch.bfloat16).contiguous().view(torch.int16).numpy()  # numpy has no bfloat16: its bits
    halved = tensor.half()
    if not torch.isfinite(halved).all():
        raise ModelError("weights exceed what float16 can hold", where=where, remedy="Write bf16 or f32 instead.")
    return halved.contiguous().numpy()
