"""What fits on which GPUs and how long it takes, by arithmetic. Bytes, seconds and tokens; GB is 1e9 bytes.

Everything here is a count or an assumption. The assumptions are the constants below, with where they come from; a plan
prints them. They are meant to be right within a factor of two: enough to choose a machine, not to bill by.
"""

from bisect import bisect_left
from dataclasses import dataclass
from math import ceil

from distill.config import Geometry, Train
from distill.config_students import Adapter
from distill.geometry import (
    cache_bytes_per_token,
    forward_flops,
    head_dim,
    is_mla,
    kv_heads,
    layer_parameters,
    parameters,
    train_flops,
)
from distill.state_bytes import element_bytes, state_bytes

GB = 1e9


@dataclass(frozen=True)
class Gpu:
    """One GPU as its data sheet has it: dense peak without sparsity; memory that a process can count on."""

    name: str
    memory_bytes: float
    bf16_flops: float
    fp32_flops: float
    hbm_bytes_per_s: float
    converts_fp8: bool = True

    def peak(self, element_bytes: int) -> float:
        return self.fp32_flops if element_bytes == 4 else self.bf16_flops  # FP8 weights: computed in bfloat16


GPUS = {
    "h100": Gpu("h100", 80 * GB, 989e12, 67e12, 3.35e12),
    "h200": Gpu("h200", 141 * GB, 989e12, 67e12, 4.8e12),
    "a100": Gpu("a100", 80 * GB, 312e12, 19.5e12, 2.04e12, converts_fp8=False),
    "l40s": Gpu("l40s", 44 * GB, 362e12, 91.6e12, 0.864e12),
    "b200": Gpu("b200", 180 * GB, 2250e12, 75e12, 8.0e12),
}

TRAIN_MFU = 0.45
RECOMPUTED_MFU = 0.35
NODES_SHARE = 0.85
SCORE_MFU = 0.45
DECODE_SHARE = 0.65
LAYER_SYNC_S = 50e-6
LAYER_SYNC_NODES_S = 150e-6
SAMPLE_WORKSPACE_BYTES = 5 * GB
TRAIN_RUNTIME_BYTES = 2 * GB
BUCKET_ELEMENTS = 5e8
CHUNK_TOKENS = 4096
FLOAT8_BYTES = 1 + 4 / 128**2  # a weight and its share of the float32 scale of a block of 128 x 128

ASSUMED = (
    f"training runs at {TRAIN_MFU:.0%} of peak (47-49 % measured on one H100 by ZeRO-1: 1.7B and 4B students, 8192 "
    f"tokens, matrix products kept), at {RECOMPUTED_MFU:.0%} where layers keep their attention alone (40 % measured, "
    f"1.7B), {1 - NODES_SHARE:.0%} slower beyond a node (not measured; neither is ZeRO-3 with students that need it)",
    f"scoring and prefill run at {SCORE_MFU:.0%} of peak (48 % measured on one H100 with a 15.8B mixture of experts)",
    f"decoding reaches {DECODE_SHARE:.0%} of the speed at which weights and cache can be read (65-76 % measured on one "
    "H100 with that model and 8 to 256 rows, 48 % with one)",
    f"a layer synchronises in {LAYER_SYNC_S * 1e6:.0f} us within a node, {LAYER_SYNC_NODES_S * 1e6:.0f} us beyond "
    "(not measured)",
    f"workspace is {SAMPLE_WORKSPACE_BYTES / GB:.0f} GB for sampling; {TRAIN_RUNTIME_BYTES / GB:.0f} GB and two "
    f"buckets of {BUCKET_ELEMENTS:.0e} elements for training; logits in chunks of {CHUNK_TOKENS} tokens in float32",
)


# --- Training ---------------------------------------------------------------------------------------------------------


def train_memory(g: Geometry, train: Train, gpus: int, adapter: Adapter | None = None) -> dict[str, float]:
    """Bytes on each of `gpus` data-parallel GPUs, by what they hold. Never more with more GPUs.

    ZeRO divides the optimizer's state (1), gradients (2) and weights (3) by the number of GPUs.
    """
    state, element = state_bytes(g, train, adapter), element_bytes(train.dtype)
    tokens = -(-train.micro_batch_tokens // train.sequence_parallel)
    share = [gpus if train.zero_stage >= stage else 1 for stage in (3, 2, 1)]
    gathered = 2 * max(layer_parameters(g), g.vocab_size * g.hidden_size) if train.zero_stage == 3 else 0
    return {
        "weights": state.weights / share[0] if train.offload_params == "none" else 0.0,
        "gradients": state.gradients / share[1],
        "optimizer": state.optimizer / share[2] if train.offload == "none" else 0.0,
        "average": state.average / share[2] if train.offload == "none" else 0.0,
        "activations": activation_bytes(g, tokens, train, element),
        "logits chunk": 4.0 * min(CHUNK_TOKENS, tokens) * g.vocab_size,
        "gathered layers": float(gathered * element),
        "workspace": TRAIN_RUNTIME_BYTES + 2 * min(BUCKET_ELEMENTS * element, state.gradients),
    }


def longest_row(g: Geometry, train: Train, gpus: int, gpu: Gpu, adapter: Adapter | None = None) -> int:
    """Tokens of the longest row that trains with these settings, in thousands of 1024; 0 where none does."""

    def is_too_long(thousands: int) -> bool:
        memory = train_memory(g, train.model_copy(update={"micro_batch_tokens": 1024 * thousands}), gpus, adapter)
        return sum(memory.values()) > gpu.memory_bytes

    return 1024 * max(0, bisect_left(range(2**16), True, key=is_too_long) - 1)


def activation_bytes(g: Geometry, tokens: int, train: Train, element: int = 2) -> float:
    """What the backward pass needs of `tokens`: what every layer keeps for it, and what it computes again of one layer.

    A layer's tensors are two norm inputs and outputs (4 h), queries and the attention's output, keys and values, and
    four tensors of the gated MLP (gate, up, activated gate, product), of one part of `mlp_tiles` at a time; attention
    scores are never stored. Recomputed, a layer keeps its input and its attention's output, or its products too. Two
    layers' share of what waits in host memory is on its way.
    """
    hidden, query, key = g.hidden_size, g.heads * head_dim(g), kv_heads(g) * head_dim(g)
    mlp = 4 * g.intermediate_size
    layer = 4 * hidden + 2 * query + 2 * key + mlp / train.mlp_tiles
    if not train.activation_checkpointing:
        kept, layer = (layer, 0) if train.mlp_tiles == 1 else (layer - mlp / train.mlp_tiles, mlp / train.mlp_tiles)
    elif train.kept_activations == "attention":
        kept = hidden + query
    else:
        kept = 2 * hidden + 2 * query + 2 * key + 2 * g.intermediate_size
    layers = min(g.layers, 2) if train.activation_offload else g.layers
    return float(tokens * element * (kept * layers + layer))


def teacher_element(g: Geometry, gpu: Gpu, dtype: str) -> int:
    """`element` of a teacher: 1 where its routed experts come in FP8 and this GPU keeps them so."""
    return 1 if g.fp8_experts and gpu.converts_fp8 and dtype != "float32" else element_bytes(dtype)


def train_seconds(
    g: Geometry, train: Train, tokens: float, trace_tokens: float, gpus: int, gpus_per_node: int, gpu: Gpu
) -> float:
    """Wall seconds of training on `tokens` (all epochs) in traces of `trace_tokens`.

    MFU counts no recomputation. GPUs for which a batch has no tokens stand idle.
    """
    busy = min(gpus, max(1, train.batch_tokens // train.micro_batch_tokens) * train.sequence_parallel)
    recomputed = train.activation_checkpointing and train.kept_activations == "attention"
    mfu = (RECOMPUTED_MFU if recomputed else TRAIN_MFU) * (1 if gpus <= gpus_per_node else NODES_SHARE)
    flops = tokens * train_flops(g, trace_tokens)
    return flops / (busy * gpu.peak(element_bytes(train.dtype)) * mfu)


# --- Sampling ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Load:
    """What is sampled: tokens of a prompt, of a completion on average and at most; completions in flight on a GPU."""

    prompt_tokens: float
    mean_new_tokens: float
    max_new_tokens: int
    batch_size: int
    samples: int  # completions in all: fewer than the GPUs could hold leave them half empty


@dataclass(frozen=True)
class Placement:
    """One way to lay a model over GPUs: a copy takes `size`; EP divides the routed experts, TP attention and MLPs."""

    tensor_parallel: int
    expert_parallel: int
    copies: int
    memory: dict[str, float]
    fits: bool
    tokens_per_s: float

    @property
    def size(self) -> int:
        return max(self.tensor_parallel, self.expert_parallel)

    @property
    def memory_bytes(self) -> float:
        return sum(self.memory.values())

    @property
    def layout(self) -> str:
        experts = f"EP {self.expert_parallel} x " if self.expert_parallel > 1 else ""
        return f"{experts}TP {self.tensor_parallel}, {self.copies} {'copy' if self.copies == 1 else 'copies'}"


def place(
    g: Geometry,
    gpu: Gpu,
    gpus: int,
    gpus_per_node: int,
    load: Load,
    element: int = 2,
    ways: tuple[int, int] | None = None,
) -> Placement:
    """The fastest placement that fits all `gpus`; if none fits, the one that needs the least memory per GPU.

    element: bytes of a weight, 1 for routed experts in block-scaled FP8 (all else is bfloat16 then, the cache too).
    ways: (TP, EP) if they are given and not to be chosen.
    """
    choice = [ways] if ways else _ways(g, gpus, gpus_per_node)
    found = [_placement(g, gpu, gpus, gpus_per_node, load, element, *way) for way in choice]
    fitting = [way for way in found if way.fits]
    if fitting:
        return max(fitting, key=lambda way: (way.tokens_per_s, -way.size))
    return min(found, key=lambda way: way.memory_bytes)


def _ways(g: Geometry, gpus: int, gpus_per_node: int) -> list[tuple[int, int]]:
    """(TP, EP) pairs: TP divides heads and MLPs and stays within a node; EP divides experts; copies fill all GPUs."""
    node = min(gpus, gpus_per_node)
    sizes = (g.heads, kv_heads(g), g.intermediate_size, g.moe_intermediate_size or 0, gpus, node)
    tensor = [n for n in range(1, node + 1) if not any(size % n for size in sizes)]
    if not is_mla(g):
        return [(n, 1) for n in tensor]
    expert = [n for n in range(1, gpus + 1) if g.routed_experts % n == 0 and gpus % n == 0]
    return [(tp, ep) for ep in expert for tp in tensor if ep % tp == 0]


def _placement(
    g: Geometry, gpu: Gpu, gpus: int, gpus_per_node: int, load: Load, element: int, tp: int, ep: int
) -> Placement:
    size, weights = max(tp, ep), weight_bytes(g, element, tp, ep)
    token_bytes = cache_bytes_per_token(g, max(element, 2), tp)
    longest = token_bytes * (load.prompt_tokens + load.max_new_tokens)
    usual = token_bytes * (load.prompt_tokens + load.mean_new_tokens)
    room = gpu.memory_bytes - sum(weights.values()) - SAMPLE_WORKSPACE_BYTES
    # The ranks of a tensor-parallel group work on the same sequences, so a group of n devices has n devices' sequences.
    sequences = max(1, min(load.batch_size * tp, ceil(load.samples * tp / gpus), int(room / usual)))
    memory = weights | {"cache": max(longest, sequences * usual), "workspace": SAMPLE_WORKSPACE_BYTES}
    step_s = _step_seconds(g, gpu, load, element, tp, ep, sequences, size > gpus_per_node)
    rate = gpus / tp * sequences / step_s
    return Placement(tp, ep, gpus // size, memory, room >= longest, rate)


def weight_bytes(g: Geometry, element: int, tp: int, ep: int) -> dict[str, float]:
    """Bytes of the weights on one GPU of a copy that is divided like this."""
    count, expert, rest = parameters(g), FLOAT8_BYTES if element == 1 else element, max(element, 2)
    other = (count.cut / tp + count.low_rank + count.whole) * rest
    return {"experts": count.routed * expert / ep, "other weights": other}


def _step_seconds(
    g: Geometry, gpu: Gpu, load: Load, element: int, tp: int, ep: int, sequences: int, across_nodes: bool
) -> float:
    """Seconds of one decoding step: the slower of reading and computing at DECODE_SHARE, and the synchronisation."""
    count, size = parameters(g), max(tp, ep)
    in_flight = sequences * size / tp
    touched = 1 - (1 - g.experts_per_token / g.routed_experts) ** in_flight if count.routed else 0.0
    weights = weight_bytes(g, element, tp, ep)
    context = load.prompt_tokens + load.mean_new_tokens / 2
    cache = sequences * cache_bytes_per_token(g, max(element, 2), tp) * context
    read = weights["experts"] * touched + weights["other weights"] - count.embedding * max(element, 2)
    read_s = (read + cache) / gpu.hbm_bytes_per_s
    compute_s = in_flight / size * forward_flops(g, context, absorbed=True) / gpu.peak(element)
    sync_s = 0.0 if size == 1 else g.layers * (LAYER_SYNC_NODES_S if across_nodes else LAYER_SYNC_S)
    return max(read_s, compute_s) / DECODE_SHARE + sync_s


def score_seconds(g: Geometry, tokens: float, seq_tokens: float, gpus: int, gpu: Gpu, element: int = 2) -> float:
    """Wall seconds of one forward pass over `tokens` in sequences of `seq_tokens`: prefill, or scoring given text."""
    return tokens * forward_flops(g, seq_tokens / 2) / (gpus * gpu.peak(element) * SCORE_MFU)
