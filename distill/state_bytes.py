"""Bytes of a student's weights, gradients and optimizer state, undivided, by the settings that choose their widths."""

from dataclasses import dataclass

from distill.config import Geometry, Train
from distill.config_students import Adapter
from distill.geometry import head_dim, kv_heads, parameters

BITS4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)  # a weight in NF4, the 8-bit scale of 64, the float32 scale of 256 of those
BITS8_BYTES = 1 + 4 / 256  # a moment of 8 bits and its share of the float32 scale of a block of 256


@dataclass(frozen=True)
class StateBytes:
    weights: float
    gradients: float
    optimizer: float  # masters and moments
    average: float
    trained: float  # weights in a checkpoint: frozen ones are not in it

    @property
    def checkpoint(self) -> float:
        return self.trained + self.optimizer + self.average


def state_bytes(g: Geometry, train: Train, adapter: Adapter | None = None) -> StateBytes:
    """AdamW in bfloat16 takes 2 weights + 2 gradients + 12 (float32 master, two moments) = 16 bytes a parameter, in
    float32 4 + 4 + 8 = 16 too. Moments of 8 bits take 2 in place of 8, but for the embedding; without masters 4 fall
    away; an adapter has all of it for its matrices alone.
    """
    element = element_bytes(train.dtype)
    total, trained = parameters(g).total, trained_parameters(g, adapter)
    frozen = frozen_bytes(g, adapter, element) if adapter is not None else 0.0
    wide = 0 if adapter is not None else g.vocab_size * g.hidden_size
    moments = 8 * trained if train.optimizer == "adamw" else 8 * wide + 2 * BITS8_BYTES * (trained - wide)
    masters = 4 * trained if element == 2 and train.master_weights == "float32" else 0
    if adapter is None and masters == 0 and element == 2 and train.zero_stage > 0:
        masters = 2 * total  # ZeRO keeps its own copy of the part that it updates, in bfloat16
    average = 4 * trained if train.ema_decay else 0
    own = float(trained * element)
    return StateBytes(frozen + own, own, float(moments + masters), float(average), own)


def element_bytes(dtype: str) -> int:
    return 4 if dtype == "float32" else 2


def trained_parameters(g: Geometry, adapter: Adapter | None) -> int:
    """All parameters, or the matrices of an adapter: (inputs + outputs) * rank of each target."""
    if adapter is None:
        return parameters(g).total
    h, q, kv, wide = g.hidden_size, g.heads * head_dim(g), kv_heads(g) * head_dim(g), g.intermediate_size
    sides = {"q_proj": h + q, "k_proj": h + kv, "v_proj": h + kv, "o_proj": q + h}
    sides |= {"gate_proj": h + wide, "up_proj": h + wide, "down_proj": wide + h}
    return g.layers * adapter.rank * sum(sides[target] for target in adapter.targets)


def frozen_bytes(g: Geometry, adapter: Adapter, element: int) -> float:
    """The base's weights: with qlora the projections of the layers are in 4 bits, embedding, head and gains are not."""
    count = parameters(g)
    narrow = count.cut if adapter.kind == "qlora" else 0
    return narrow * BITS4_BYTES + (count.total - narrow) * element
