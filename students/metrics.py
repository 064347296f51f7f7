"""What a step of training tells: the row of log.jsonl, and the steps whose loss stands out.

Names and units are those of distill/metrics.py, under train/.
"""

import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from dataclasses import fields as fields_of

import torch

from distill.capacity import GPUS
from distill.config_geometry import Geometry
from distill.errors import DataError
from distill.geometry import train_flops
from distill.losses.metrics import LossMetrics
from students.mixture import Mixture
from students.packing import StepPlan, TrainPlan

WINDOW_STEPS = 64  # that a loss is compared with
FEWEST_STEPS = 16  # before any comparison
SPIKE_Z = 8.0  # of a loss that is written to spikes.jsonl; normal noise passes 5 once in millions of steps


@dataclass(frozen=True)
class Sums:
    """What the micro-batches of all ranks add up to: LossMetrics, and the loss of each set of a mixture."""

    metrics: LossMetrics
    set_losses: list[float]

    @classmethod
    def of(cls, values: Sequence[float]) -> "Sums":
        count = len(fields_of(LossMetrics))
        return cls(LossMetrics.from_tensor(torch.tensor(values[:count])), list(values[count:]))


def means(sums: Sums, trained_tokens: int, has_teacher: bool) -> dict[str, float]:
    """Cross-entropy, divergence, agreement and masses per token. top1: agreement with the teacher where distributions
    are given, else with the text. DataError if other tokens than planned were trained."""
    found = sums.metrics.means()
    if found["tokens"] != trained_tokens:
        raise DataError(f"{found['tokens']} tokens were trained, {trained_tokens} were planned", where="step")
    common = {"ce": found["ce"], "entropy": found["entropy"]}
    if not has_teacher:
        return {**common, "top1": found["label_top1"]}
    names = ("kl", "top1", "support_mass", "student_tail")
    teacher = {"kd": found["divergence"], **{name: found[name] for name in names}, "tail": found["teacher_tail"]}
    return {**common, **teacher, "teacher_share": found["teacher_tokens"] / found["tokens"]}


def by_set(sums: Sums, data: Mixture, step: StepPlan) -> dict[str, float]:
    """loss/<set>: the unweighted loss of a mixture's set per trained token of that set, for each set in this step."""
    tokens = [0.0] * len(data.parts)
    for i in (i for row in step.rows for i in row):
        tokens[data.set_of[i]] += len(data.examples[i].trained) * data.parts[data.set_of[i]].loss_weight
    scale = step.trained_tokens  # each set's sum was divided by all trained tokens
    return {f"loss/{n}": loss * scale / t for n, loss, t in zip(data.names, sums.set_losses, tokens) if t}


class Spikes:
    """Tells a loss that stands out from the steps before: by how many robust standard deviations."""

    def __init__(self, losses: Sequence[float] = ()):
        """losses: of the steps so far, where a training goes on."""
        self._window = deque(losses[-WINDOW_STEPS:], maxlen=WINDOW_STEPS)

    def z(self, loss: float) -> float | None:
        """(loss - median) / (1.4826 median absolute deviation) of the steps before, at most WINDOW_STEPS; None while
        they are few. The loss joins them."""
        before, found = list(self._window), None
        if len(before) >= FEWEST_STEPS:
            middle = statistics.median(before)
            spread = 1.4826 * statistics.median(abs(each - middle) for each in before)
            found = (loss - middle) / max(spread, 1e-3 * abs(middle), 1e-12)  # 1e-3: a constant loss has no spread
        self._window.append(loss)
        return found


@dataclass
class Speed:
    """Tokens per second, model FLOPs over the devices' peak, memory; of GPUs where the last two can be told."""

    plan: TrainPlan
    geometry: Geometry
    dtype: torch.dtype
    device: torch.device
    devices: int
    frozen: bool = False  # the base's weights, under an adapter
    _flops_per_token: float = field(init=False)
    _peak: float | None = field(init=False)

    def __post_init__(self) -> None:
        lengths = self.plan.lengths
        # attention is quadratic: a token sees on average half of its own trace, and longer traces have more tokens
        mean = sum(n * n for n in lengths) / sum(lengths)
        self._flops_per_token = train_flops(self.geometry, mean, frozen=self.frozen)
        self._peak = peak_flops(self.device, self.dtype)
        if self.device.type == "cuda":  # the peak is to be the training's, not that of the teacher before it
            torch.cuda.reset_peak_memory_stats(self.device)

    def row(self, tokens: int, step_s: float, wait_s: float) -> dict[str, float]:
        rate = tokens / step_s
        found = {"tokens_per_s": rate, "step_s": step_s, "data_wait_s": wait_s}
        if self._peak:
            found["mfu"] = rate * self._flops_per_token / (self._peak * self.devices)
        if self.device.type == "cuda":
            found["memory_gib"] = torch.cuda.max_memory_allocated(self.device) / 2**30
        return found


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """The data sheet's dense peak of a known GPU in this dtype; None for others."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device).lower()
    return next((gpu.peak(dtype.itemsize) for kind, gpu in GPUS.items() if kind in name), None)
