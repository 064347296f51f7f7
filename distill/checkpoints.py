"""Whether a model folder can be loaded, and which weights it holds, before anything is loaded. No torch.

Reads config.json, the index and the safetensors headers only: a damaged 600 GB checkpoint is refused in milliseconds.
"""

import hashlib
import json
import math
import os
import struct
from pathlib import Path

from distill.errors import ModelError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
BITS = {"F64": 64, "F32": 32, "F16": 16, "BF16": 16, "I64": 64, "I32": 32, "I16": 16, "I8": 8, "U64": 64, "U32": 32}
BITS |= {"U16": 16, "U8": 8, "BOOL": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F4": 4, "C64": 64}
LARGEST_HEADER_BYTES = 100 << 20  # the limit of the safetensors format
WHOLE_FILE_BYTES = 1 << 30  # checkpoints up to this size are hashed whole


def check_checkpoint(path: str | os.PathLike) -> dict:
    """The config (parsed config.json) of a checkpoint whose safetensors files are all there and whole.

    `path` is a folder, or a Hub id whose files are fetched (or found in the cache when HF_HUB_OFFLINE is set).
    ModelError names the file at fault: no folder, no readable config.json, pickled weights only, no weights, a shard
    that is missing, cut short or not safetensors, a tensor that the index promises and the shard lacks.
    """
    folder = resolve_checkpoint(path)
    config = _read_json(folder / "config.json")
    if "model_type" not in config:
        raise ModelError(
            "the config names no model_type",
            where=str(folder / "config.json"),
            remedy="Use a checkpoint saved by transformers' save_pretrained.",
        )
    for file, promised in weight_files(folder).items():
        held = read_header(file)
        if lacking := promised - held.keys():
            raise ModelError(
                f"{len(lacking)} tensors that {INDEX} promises are not in this file",
                where=str(file),
                value=min(lacking),
                remedy="Copy the index and all the shards again from one source.",
            )
    return config


def resolve_checkpoint(path: str | os.PathLike) -> Path:
    """The folder of a checkpoint: `path` itself, or the local snapshot of a Hub id (safetensors, JSON, template)."""
    folder = Path(path)
    if folder.is_dir():
        return folder
    if len(parts := str(path).split("/")) != 2 or not all(parts) or parts[0] in (".", "..", "~"):
        raise ModelError("there is no such folder", where=str(path), remedy="Give a checkpoint folder or a Hub id.")
    from huggingface_hub import snapshot_download  # only a Hub id pays for the import

    try:
        return Path(snapshot_download(str(path), allow_patterns=["*.safetensors", "*.json", "*.jinja"]))
    except Exception as error:  # offline, refused, unknown: each its own class
        raise ModelError(
            f"there is no such folder, and the Hub does not give it: {error}",
            where=str(path),
            remedy="Give a checkpoint folder, or check the name, the network, HF_TOKEN and HF_HUB_OFFLINE.",
        ) from error


def read_header(file: Path) -> dict[str, dict]:
    """Tensor name -> {dtype, shape, data_offsets} of one safetensors file, checked against the file's size."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        prefix = stream.read(8)
        header_bytes = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if not 2 <= header_bytes <= LARGEST_HEADER_BYTES:
            raise _damaged(file, "is no safetensors file", size)
        raw = stream.read(header_bytes)
    if len(raw) < header_bytes:
        raise _damaged(file, f"is cut short inside its header of {header_bytes} bytes", size)
    try:
        header = json.loads(raw)
        header.pop("__metadata__", None)
        held_bytes = max((_checked_end(tensor) for tensor in header.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(file, f"has an unreadable header ({error})", size) from error
    if size != 8 + header_bytes + held_bytes:
        raise _damaged(file, f"should have {8 + header_bytes + held_bytes} bytes", size)
    return header


def fingerprint_checkpoint(path: str | os.PathLike) -> str:
    """16 hex digits that change with the weights: sha256 over config.json and the weight files.

    Up to 1 GB the files are hashed whole; above, their sizes, headers, first and last MiB: 1.4 TB takes hours to read.
    """
    folder = resolve_checkpoint(path)
    files = sorted(weight_files(folder))
    whole = sum(file.stat().st_size for file in files) <= WHOLE_FILE_BYTES
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for file in files:
        digest.update(f"{file.name} {file.stat().st_size}".encode())
        if whole:
            with file.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
        else:
            digest.update(json.dumps(read_header(file), sort_keys=True).encode() + _ends(file))
    return digest.hexdigest()[:16]


def _ends(file: Path, size_bytes: int = 1 << 20) -> bytes:
    with file.open("rb") as stream:
        first = stream.read(size_bytes)
        stream.seek(max(0, file.stat().st_size - size_bytes))
        return first + stream.read()


def weight_files(folder: Path) -> dict[Path, set[str]]:
    """Weight file -> the tensors that the index says it holds (none said for a single file)."""
    if (folder / SINGLE).is_file():
        return {folder / SINGLE: set()}
    if (folder / INDEX).is_file():
        return _indexed_files(folder)
    pickles = sorted(file.name for file in folder.iterdir() if file.suffix in PICKLES)
    if pickles:
        raise ModelError(
            "the weights are pickled, and a pickle can run code: it is never loaded",
            where=str(folder / pickles[0]),
            remedy="Convert them to safetensors: where you trust it, load it with transformers and save_pretrained.",
        )
    raise ModelError(
        f"the folder holds neither {SINGLE} nor {INDEX}", where=str(folder), remedy="Copy the whole checkpoint folder."
    )


def _indexed_files(folder: Path) -> dict[Path, set[str]]:
    weight_map = _read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError("the index has no weight_map", where=str(folder / INDEX), remedy="Copy the index again.")
    promised: dict[Path, set[str]] = {}
    for tensor, name in weight_map.items():
        promised.setdefault(folder / name, set()).add(tensor)
    for file in promised:
        if file.parent != folder or file.suffix != ".safetensors":
            raise ModelError(
                "the index names a file that is no safetensors file of this folder",
                where=str(folder / INDEX),
                value=str(file),
                remedy="Copy the checkpoint again from its source.",
            )
        if not file.is_file():
            raise ModelError(
                f"a shard that {INDEX} names is missing", where=str(file), remedy="Copy the whole checkpoint folder."
            )
    return promised


def _checked_end(tensor: dict) -> int:
    begin, end = tensor["data_offsets"]
    bits = math.prod(tensor["shape"]) * BITS[tensor["dtype"]]
    if (end - begin) * 8 != bits:
        raise ValueError(f"a tensor of {bits // 8} bytes has {end - begin}")
    return end


def _read_json(file: Path) -> dict:
    try:
        content = json.loads(file.read_bytes())
    except FileNotFoundError:
        raise ModelError(
            f"the folder holds no {file.name}", where=str(file.parent), remedy="Copy the whole checkpoint folder."
        ) from None
    except ValueError as error:
        raise ModelError(f"not JSON: {error}", where=str(file), remedy="Copy the file again.") from error
    if not isinstance(content, dict):
        raise ModelError("not a JSON object", where=str(file), remedy="Copy the file again.")
    return content


def _damaged(file: Path, what: str, size_bytes: int) -> ModelError:
    return ModelError(
        f"this weight file {what}; it has {size_bytes} bytes", where=str(file), remedy="Copy or download it again."
    )
