"""Parts of a checkpoint's tensors, read from safetensors straight into a model's parameters.

A reader copies only the bytes of the slice that is asked for, in chunks, so that the host never holds more than a chunk
beside the model. Block-scaled FP8 weights (DeepSeek-V3's format: `X` in e4m3 with `X_scale_inv`, one factor a block of
128 x 128, the last block of a dimension cut short) are widened chunk by chunk. Row i of a slice that starts at row lo
belongs to block row (lo + i) // 128 of the whole tensor, wherever the slice begins, and every weight is one product of
float32: so a slice equals the same part of the whole tensor, widened, bit for bit.
"""

import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import torch
from safetensors import safe_open
from torch import Tensor, nn

from distill.checkpoints import read_header, weight_files
from distill.errors import ModelError
from teachers.scaled import ScaledWeights

CHUNK_ELEMENTS = 4 << 20  # of a tensor that are read, widened and copied at once
MOST_OPEN_FILES = 4  # a tensor and its scales may stand in two; mapped files count as memory of the process
SCALE = "_scale_inv"
FLOAT8 = "F8_E4M3"


@dataclass(frozen=True)
class Part:
    """Indices lo..hi-1 of a dimension of `total`."""

    lo: int
    hi: int
    total: int

    @classmethod
    def whole(cls, total: int) -> Self:
        return cls(0, total, total)

    def __len__(self) -> int:
        return self.hi - self.lo


@dataclass(frozen=True)
class Piece:
    """A tensor to fill, and what with: rows and columns of tensor `name` (None: all of them)."""

    target: Tensor
    name: str
    rows: Part | None = None
    columns: Part | None = None

    @property
    def parts(self) -> tuple[Part, ...]:
        given = (self.rows, self.columns)
        return tuple(
            given[i] if i < 2 and given[i] is not None else Part.whole(n) for i, n in enumerate(self.target.shape)
        )


@dataclass
class LoadReport:
    """What loading took on this rank. Host memory is anonymous memory above that before the load (0 where the system
    does not tell): file pages that the kernel keeps for reading are not the process's own."""

    bytes_read: int = 0
    held_bytes: int = 0  # parameters and buffers, once loaded
    peak_host_bytes: int = 0
    seconds: float = 0.0
    host_bytes_before: int = field(default_factory=lambda: host_bytes())

    def look(self) -> None:
        """Notes how much memory the process has now."""
        self.peak_host_bytes = max(self.peak_host_bytes, host_bytes() - self.host_bytes_before)

    def __str__(self) -> str:
        sizes = f"{self.bytes_read / 1e9:.2f} GB read, {self.held_bytes / 1e9:.2f} GB held"
        return f"{sizes}, {self.peak_host_bytes / 1e9:.2f} GB of host memory at most, {self.seconds:.1f} s"


class SliceReader:
    """The tensors of a checkpoint folder by name, to be copied in parts.

    block: the (rows, columns) that share a scale, where the checkpoint has FP8 weights. ModelError names the file of a
    tensor that is missing, has another shape than the model, or is stored in a way that is not read.
    """

    def __init__(self, folder: Path, block: tuple[int, int] | None = None):
        self.folder, self.block, self.bytes_read = folder, block, 0
        self._headers = {
            name: (file, tensor) for file in weight_files(folder) for name, tensor in read_header(file).items()
        }
        self._open_files: dict[Path, safe_open] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._headers

    def position(self, name: str) -> tuple[Path, int]:
        """File and offset: in this order a disk reads forward."""
        file, tensor = self._headers[name]
        return file, tensor["data_offsets"][0]

    def chunks(self, piece: Piece) -> Iterator[Tensor]:
        """Fills the piece's target; gives each chunk of it that has been filled, in order."""
        parts, shape = piece.parts, tuple(self._headers[piece.name][1]["shape"])
        if shape != tuple(part.total for part in parts) or piece.target.shape != tuple(map(len, parts)):
            raise self._error(piece.name, f"has shape {list(shape)}, the model wants {[part.total for part in parts]}")
        if not parts:
            piece.target.copy_(self._slice(piece.name))
            return
        first, rest = parts[0], parts[1:]
        step = max(1, CHUNK_ELEMENTS // max(1, math.prod(map(len, rest))))
        for lo in range(first.lo, first.hi, step):
            rows = Part(lo, min(lo + step, first.hi), first.total)
            chunk = piece.target[rows.lo - first.lo : rows.hi - first.lo]
            chunk.copy_(self._read(piece.name, (rows, *rest), chunk))
            yield chunk

    def _read(self, name: str, parts: tuple[Part, ...], target: Tensor) -> Tensor:
        """What goes into `target`: FP8 as it is stored where the target is FP8, else widened."""
        if target.dtype != torch.float8_e4m3fn:
            return self._widened(name, parts, target.device)
        if self._headers[name][1]["dtype"] != FLOAT8:
            raise self._error(name, "is not FP8, though other experts of this checkpoint are")
        return self._slice(name, *parts)

    def _widened(self, name: str, parts: tuple[Part, ...], device: torch.device) -> Tensor:
        stored = self._slice(name, *parts)
        if self._headers[name][1]["dtype"] != FLOAT8:
            return stored
        if self.block is None or len(parts) != 2 or name + SCALE not in self:
            raise self._error(name, f"is FP8, but not a matrix with {SCALE} and weight_block_size in config.json")
        blocks = [Part(p.lo // b, -(-p.hi // b), -(-p.total // b)) for p, b in zip(parts, self.block)]
        if list(self._headers[name + SCALE][1]["shape"]) != [block.total for block in blocks]:
            raise self._error(name + SCALE, f"should have one scale a block of {self.block[0]} x {self.block[1]}")
        scale_RC = self._slice(name + SCALE, *blocks).to(device, torch.float32)
        row_N, column_M = (
            torch.arange(p.lo, p.hi, device=device) // b - block.lo for p, b, block in zip(parts, self.block, blocks)
        )
        return stored.to(device).float().mul_(scale_RC[row_N][:, column_M])

    def _slice(self, name: str, *parts: Part) -> Tensor:
        file = self._headers[name][0]
        if file not in self._open_files:
            if len(self._open_files) == MOST_OPEN_FILES:
                self._open_files.pop(next(iter(self._open_files)))  # the one opened first; unmapped with its last slice
            self._open_files[file] = safe_open(file, framework="pt")
        view = self._open_files[file].get_slice(name)[tuple(slice(part.lo, part.hi) for part in parts) or ...]
        self.bytes_read += view.nbytes
        return view

    def _error(self, name: str, what: str) -> ModelError:
        return ModelError(
            f"tensor {name} {what}",
            where=str(self._headers[name][0]),
            remedy="Copy the checkpoint again from one source, config.json included.",
        )


def fill(reader: SliceReader, pieces: Iterable[Piece], report: LoadReport) -> None:
    """Copies every piece, file by file; counts into the report. ModelError when a tensor is missing."""
    wanted = list(pieces)
    if missing := sorted({piece.name for piece in wanted if piece.name not in reader}):
        raise ModelError(
            f"{len(missing)} weights are missing from the checkpoint",
            where=str(reader.folder),
            value=missing[0],
            remedy="Copy the checkpoint again, or correct config.json.",
        )
    started_s, read = time.monotonic(), reader.bytes_read
    with torch.no_grad():
        for piece in sorted(wanted, key=lambda piece: reader.position(piece.name)):
            for _ in reader.chunks(piece):
                report.look()
    report.bytes_read += reader.bytes_read - read
    report.seconds += time.monotonic() - started_s


def block_of(config: dict, folder: Path) -> tuple[int, int] | None:
    """The block size of a checkpoint's FP8 weights, None for plain weights; `config` is its config.json."""
    quantization = config.get("quantization_config")
    if quantization is None:
        return None
    block = quantization.get("weight_block_size")
    is_block = isinstance(block, list) and len(block) == 2 and all(isinstance(b, int) and b > 0 for b in block)
    if quantization.get("quant_method") != "fp8" or not is_block:
        raise ModelError(
            "quantised weights of this kind are not loaded",
            where=f"{folder}/config.json quantization_config",
            value=quantization.get("quant_method"),
            remedy="Use a checkpoint in bfloat16, or in FP8 with weight_block_size as DeepSeek-V3 has it.",
        )
    return block[0], block[1]


def held_bytes(model: nn.Module) -> int:
    """Bytes behind all parameters and buffers; what several of them share counts once."""
    kept = [value for module in model.modules() for value in vars(module).values() if isinstance(value, ScaledWeights)]
    tensors = [*model.parameters(), *model.buffers(), *(t for k in kept for t in (k.values_XPNK, k.scales_XPRC))]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if not t.is_meta}
    return sum(storages.values())


def host_bytes() -> int:
    """Anonymous memory of this process, 0 where the system does not tell."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:")), 0)
