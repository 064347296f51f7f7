"""Settings of students: which base model, which loss, how it is trained."""

from typing import Annotated, Literal

from pydantic import Field

from distill.config_geometry import Geometry
from distill.config_types import NAME, Divergence, Int, Section, setting


class Loss(Section):
    """loss = alpha * temperature^2 * divergence + (1 - alpha) * cross-entropy."""

    kind: Literal["response", "logits"] = setting(..., "learn from the text alone, or from distributions too")
    alpha: float = setting(
        0.0, "weight of the divergence", ge=0, le=1, use="Use 0 with kind response, 0.9 with kind logits."
    )
    divergence: Divergence = setting("forward_kl", "distance of the student from the teacher")
    beta: float = setting(0.5, "mixture weight of jsd, scaled_jsd and skew_kl", ge=0, le=1)
    temperature: float = setting(1.0, "softens teacher and student", gt=0, use="Use 1.0 to leave logits unchanged.")


class Student(Section):
    name: str = setting(..., "name in folders and tables", pattern=NAME, use="Use letters, digits, . _ and -.")
    path: str = setting(..., "folder or Hub id of the base model", min_length=1)
    geometry: Geometry | None = setting(None, "sizes for the plan; null reads config.json in path")
    loss: Loss = setting(Loss(kind="response"), "what the student learns from")


class Train(Section):
    epochs: Int = setting(2, "passes over the traces", unit="epochs", ge=1)
    max_seq_tokens: Int = setting(4096, "length of a packed row, and of the longest trace", unit="tokens", ge=8)
    batch_tokens: Int = setting(65536, "tokens of one optimizer step, over all devices", unit="tokens", ge=8)
    micro_batch_tokens: Int = setting(4096, "tokens of one forward pass on one device", unit="tokens", ge=8)
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
    zero_stage: Literal[0, 1, 2, 3] = setting(1, "what DeepSpeed shards: 1 optimizer, 2 gradients, 3 weights")
    offload: Literal["none", "cpu", "nvme"] = setting("none", "where optimizer state lives")
    activation_checkpointing: bool = setting(False, "recompute activations in the backward pass")
    compile: Literal["auto", "on", "off"] = setting("auto", "torch.compile of the layers; auto is on for a GPU alone")
    dtype: Literal["auto", "float32", "bfloat16"] = setting("auto", "auto is bfloat16 on GPU, float32 on CPU")
