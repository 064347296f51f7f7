"""The functions of teachers.plain on a GPU, under the same names."""

from teachers.kernels.elementwise import add_norm, rope_and_cache, silu_mul
from teachers.kernels.mla import mla_decode
from teachers.kernels.moe import experts, group, route

__all__ = ["add_norm", "experts", "group", "mla_decode", "rope_and_cache", "route", "silu_mul"]
