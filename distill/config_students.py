"""Settings of students: which base model, which loss, how it is trained."""

from typing import Annotated, Literal

from pydantic import Field

from distill.config_geometry import Geometry
from distill.config_mixture import General, OnPolicy, TextSet, TraceSet
from distill.config_types import NAME, Divergence, Int, Section, setting

Target = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class Loss(Section):
    """loss = alpha * temperature^2 * divergence + (1 - alpha) * cross-entropy."""

    kind: Literal["response", "logits"] = setting(..., "learn from the text alone, or from distributions too")
    alpha: float = setting(
        0.0, "weight of the divergence", ge=0, le=1, use="Use 0 with kind response, 0.9 with kind logits."
    )
    divergence: Divergence = setting("forward_kl", "distance of the student from the teacher")
    target: Literal["teacher", "sampling"] = setting(
        "teacher", "what is learned: the teacher's distribution, or the law its traces were drawn from"
    )
    beta: float = setting(0.5, "mixture weight of jsd, scaled_jsd and skew_kl", ge=0, le=1)
    temperature: float = setting(1.0, "softens teacher and student", gt=0, use="Use 1.0 to leave logits unchanged.")


class Adapter(Section):
    """Low-rank matrices that are trained in place of the weights, and added to them in the exported student."""

    kind: Literal["lora", "qlora"] = setting(..., "frozen weights as they are, or in 4 bits (NF4)")
    rank: Int = setting(16, "inner size of the two matrices of each target", ge=1, le=4096)
    alpha: float = setting(32.0, "the product of the two is scaled by alpha / rank", gt=0)
    dropout: float = setting(0.0, "share of a target's inputs that the matrices do not see", ge=0, lt=1)
    targets: list[Target] = setting(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"], "projections that get them",
        min_length=1,
    )  # fmt: skip


class Student(Section):
    name: str = setting(..., "name in folders and tables", pattern=NAME, use="Use letters, digits, . _ and -.")
    path: str = setting(..., "folder or Hub id of the base model", min_length=1)
    geometry: Geometry | None = setting(None, "sizes for the plan; null reads config.json in path")
    loss: Loss = setting(Loss(kind="response"), "what the student learns from")
    adapter: Adapter | None = setting(None, "train low-rank matrices alone; null trains every weight")


class Train(Section):
    epochs: Int = setting(2, "passes over the traces", unit="epochs", ge=1)
    max_seq_tokens: Int = setting(4096, "length of a packed row, and of the longest trace", unit="tokens", ge=8)
    batch_tokens: Int = setting(65536, "tokens of one optimizer step, over all devices", unit="tokens", ge=8)
    micro_batch_tokens: Int = setting(
        4096, "tokens of one forward pass, on a device or all that share a row", unit="tokens", ge=8
    )
    lr: float = setting(
        1e-5, "peak learning rate", gt=0, lt=1, use="Use 1e-5 for a large student, 1e-3 for a tiny one."
    )
    embedding_lr_ratio: float = setting(1.0, "learning rate of embedding and head over that of the rest", gt=0, le=1)
    min_lr_ratio: float = setting(0.1, "last learning rate over the peak", ge=0, le=1)
    warmup_ratio: float = setting(0.03, "share of the steps that warm up", ge=0, lt=1)
    weight_decay: float = setting(0.0, "decoupled, as in AdamW", ge=0)
    betas: list[Annotated[float, Field(ge=0, lt=1)]] = setting(
        [0.9, 0.95], "moment decay of AdamW", min_length=2, max_length=2
    )
    clip_norm: float = setting(1.0, "largest gradient norm; 0 switches clipping off", ge=0)
    schedule: Literal["cosine", "linear", "constant"] = setting("cosine", "learning rate after warm-up")
    checkpoint_steps: Int = setting(100, "steps between checkpoints", unit="steps", ge=1)
    keep_checkpoints: Int = setting(2, "last checkpoints kept", unit="checkpoints", ge=1)
    keep_best: bool = setting(False, "also keep the checkpoint with the lowest loss, held-out if there is one")
    zero_stage: Literal[0, 1, 2, 3] = setting(1, "what DeepSpeed shards: 1 optimizer, 2 gradients, 3 weights")
    sequence_parallel: Int = setting(
        1, "devices that share a row, each with a part of its tokens", unit="devices", ge=1
    )
    offload: Literal["none", "cpu", "nvme"] = setting("none", "where optimizer state lives")
    offload_params: Literal["none", "cpu", "nvme"] = setting("none", "where weights wait that no layer needs now")
    optimizer: Literal["adamw", "adamw8bit", "paged_adamw8bit"] = setting(
        "adamw", "8bit: moments of 8 bits; paged: which CUDA moves to the host when the GPU is full"
    )
    master_weights: Literal["float32", "none"] = setting(
        "float32", "with bfloat16: a wider copy of the weights; none rounds each update at random instead"
    )
    ema_decay: float = setting(
        0.0, "export the moving average of the weights with this decay; 0 exports the last", ge=0, lt=1
    )
    activation_checkpointing: bool = setting(False, "recompute activations in the backward pass")
    kept_activations: Literal["attention", "products"] = setting(
        "attention", "what a recomputed layer keeps beside its input: products is faster and takes more memory"
    )
    activation_offload: bool = setting(False, "what layers keep for the backward pass waits in the host's memory")
    mlp_tiles: Int = setting(1, "parts of a row that the MLP takes one by one, recomputed; more need less memory", ge=1)
    compile: Literal["auto", "on", "off"] = setting("auto", "torch.compile of the layers; auto is on for a GPU alone")
    dtype: Literal["auto", "float32", "bfloat16"] = setting("auto", "auto is bfloat16 on GPU, float32 on CPU")
    trace_sets: list[TraceSet] = setting([], "traces of other runs to train on as well, for every student")
    general: General | None = setting(
        None, "data that keeps what the base could do; {} takes bundled questions; null trains on traces alone"
    )
    text_sets: list[TextSet] = setting(
        [], "conversations that the teacher reads and did not write, to train on as well; for students of kind logits"
    )
    on_policy: OnPolicy | None = setting(
        None, "rounds after the traces in which students learn from what they write themselves; null for none"
    )
    too_long: Literal["drop", "split"] = setting(
        "drop", "traces longer than a row: left out and counted, or cut into rows that do not see one another"
    )
    curriculum: Literal["none", "length"] = setting("none", "length: the first epoch goes from short traces to long")
    eval_traces: Int = setting(
        0, "kept traces held out of training, whole prompts, to evaluate on", unit="traces", ge=0
    )
    eval_steps: Int = setting(100, "steps between evaluations on the held-out traces", unit="steps", ge=1)
    loader_workers: Int = setting(
        1, "threads that make micro-batches ahead of the device; 0 makes them in the loop", unit="threads", ge=0, le=64
    )
