"""The functions of teachers.plain on a GPU, under the same names."""

from teachers.kernels.elementwise import add_norm, combine, rope_and_cache, silu_mul, spread
from teachers.kernels.gqa import attend_ragged, gqa_decode, rotate_heads
from teachers.kernels.mla import mla_decode
from teachers.kernels.moe import experts, group
from teachers.kernels.route import route

__all__ = [
    "add_norm",
    "attend_ragged",
    "combine",
    "experts",
    "gqa_decode",
    "group",
    "mla_decode",
    "rope_and_cache",
    "rotate_heads",
    "route",
    "silu_mul",
    "spread",
]
