"""What the drawing kernels share: a weight, a row's random number, the choice of an id by cumulative weight, and floats
as integers in the same order."""

import triton
import triton.language as tl

from distill.sampling import SMALLEST

_SMALLEST = tl.constexpr(SMALLEST)


@triton.jit
def weight(logit, best, temperature):
    return tl.exp(tl.maximum((logit - best) / temperature, _SMALLEST))


@triton.jit
def _splitmix64(z):
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    return z ^ (z >> 31)


@triton.jit
def uniform(seeds, drawn, row):
    seed = tl.load(seeds + row).to(tl.uint64)
    position = tl.load(drawn + row).to(tl.uint64)
    golden = tl.full([], 0x9E3779B97F4A7C15, tl.uint64)
    bits = _splitmix64(_splitmix64(seed) + (position + 1) * golden)
    return (bits >> 11).to(tl.float64) * 1.1102230246251565e-16  # 2^-53


@triton.jit
def pick(logits, sums, row, stride, V, best, temperature, least, min_p, target, C2: tl.constexpr, CHUNK: tl.constexpr):
    """The first id that is kept (logit >= least, weight >= min_p) whose cumulative weight exceeds target.

    sums: the kept weight of each chunk. Rounding never picks an id that is not kept.
    """
    c = tl.arange(0, C2)
    ends = tl.cumsum(sums, 0)
    last = tl.max(tl.where(sums > 0, c, 0), 0)
    chunk = tl.minimum(tl.sum((ends <= target).to(tl.int32), 0), last)
    before = tl.sum(tl.where(c < chunk, sums, 0.0), 0)
    i = tl.arange(0, CHUNK)
    v = chunk * CHUNK + i
    logit = tl.load(logits + row * stride + v, mask=v < V, other=float("-inf"))
    mass = weight(logit, best, temperature)
    kept = (v < V) & (logit >= least) & (mass >= min_p)
    ends = tl.cumsum(tl.where(kept, mass, 0.0).to(tl.float64), 0)
    beyond = kept & (ends > target - before)
    last = tl.max(tl.where(kept, i, 0), 0)
    return chunk * CHUNK + tl.minimum(tl.min(tl.where(beyond, i, CHUNK), 0), last)


@triton.jit
def key(logit):
    """int32 in the order of the floats."""
    bits = logit.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def from_key(order):
    """The float whose `key` this is."""
    order = order.to(tl.int32)
    return (order ^ ((order >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
