"""Expert weights as DeepSeek-V3's checkpoints store them: e4m3, and a float32 factor for each block of 128 x 128.

Half the bytes of bfloat16 to hold and to read, and nothing is rounded: a product takes the e4m3 values, exact in
bfloat16, and its sums over a block are multiplied by the factor in float32.

Shape legend: X experts, P matrices of an expert that stand on top of each other (gate and up: 2), N their rows, K
columns, R = ceil(N / 128) and C = ceil(K / 128) blocks.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 128
FLOAT8 = torch.float8_e4m3fn


@dataclass(frozen=True)
class ScaledWeights:
    """values_XPNK: float8_e4m3fn; scales_XPRC: float32, of block (i // 128, j // 128) of each matrix."""

    values_XPNK: Tensor
    scales_XPRC: Tensor

    def __post_init__(self):
        experts, parts, rows, columns = self.values_XPNK.shape
        wanted = (experts, parts, -(-rows // BLOCK), -(-columns // BLOCK))
        if self.scales_XPRC.shape != wanted or self.values_XPNK.dtype != FLOAT8:
            raise ValueError(f"scales {tuple(self.scales_XPRC.shape)} of {self.values_XPNK.dtype}, not {wanted}")

    def __len__(self) -> int:
        return len(self.values_XPNK)

    @classmethod
    def empty(cls, experts: int, parts: int, rows: int, columns: int, device: torch.device) -> "ScaledWeights":
        """Room for so many matrices."""
        values = torch.empty(experts, parts, rows, columns, dtype=FLOAT8, device=device)
        return cls(values, torch.empty(experts, parts, -(-rows // BLOCK), -(-columns // BLOCK), device=device))

    @property
    def device(self) -> torch.device:
        return self.values_XPNK.device

    @property
    def dtype(self) -> torch.dtype:
        return self.values_XPNK.dtype

    @property
    def shape(self) -> tuple[int, int, int]:
        """(X, P * N, K): that of the same weights widened."""
        experts, parts, rows, columns = self.values_XPNK.shape
        return experts, parts * rows, columns

    def widened(self, dtype: torch.dtype) -> Tensor:
        """[X, P * N, K] in that dtype: each value times its block's factor, one product of float32 each."""
        rows, columns = self.values_XPNK.shape[2:]
        scale = self.scales_XPRC.repeat_interleave(BLOCK, 2)[:, :, :rows].repeat_interleave(BLOCK, 3)[..., :columns]
        return (self.values_XPNK.float() * scale).to(dtype).flatten(1, 2)
