"""Why a model does not fit on the planned GPUs, and the smallest changes with which it does."""

from collections.abc import Iterator
from dataclasses import dataclass

from distill.capacity import GB, GPUS, Gpu, Load, Placement, place, train_memory
from distill.config import Geometry, Student, Train

MOST_GPUS = 1024


@dataclass(frozen=True)
class Machine:
    """`gpus` GPUs of one kind, `gpus_per_node` of them joined by NVLink."""

    gpu: Gpu
    gpus: int
    gpus_per_node: int

    def larger_counts(self) -> list[int]:
        """Doubled numbers of GPUs, in whole nodes."""
        counts = [self.gpus * 2**i for i in range(1, 11) if self.gpus * 2**i <= MOST_GPUS]
        return [n for n in counts if n <= self.gpus_per_node or n % self.gpus_per_node == 0]

    def larger_kinds(self) -> list[Gpu]:
        return [kind for kind in GPUS.values() if kind.memory_bytes > self.gpu.memory_bytes]

    def lacks(self, model: str, work: str, need_bytes: float, how: str) -> str:
        need = f"{model}: {work} needs {need_bytes / GB:.0f} GB per GPU with {how} on {self.gpus} x {self.gpu.name}"
        return f"{need}, which has {self.gpu.memory_bytes / GB:.0f}"


def cannot_sample(
    machine: Machine, model: str, g: Geometry, load: Load, element: int, best: Placement, chosen: bool = False
) -> str:
    """The sentence for a model that cannot be sampled; `best` is the placement that needs least, or the one that the
    config has `chosen`."""

    def fits(gpu: Gpu, gpus: int) -> bool:
        return place(g, gpu, gpus, machine.gpus_per_node, load, element).fits

    if chosen and fits(machine.gpu, machine.gpus):
        lack = machine.lacks(model, "sampling", best.memory_bytes, best.layout)
        return f"{lack}. Set teacher.tensor_parallel and teacher.expert_parallel to auto."
    ways = [f"{n} x {machine.gpu.name}" for n in machine.larger_counts() if fits(machine.gpu, n)][:1]
    ways += [f"{machine.gpus} x {kind.name}" for kind in machine.larger_kinds() if fits(kind, machine.gpus)]
    both = [(kind, n) for n in machine.larger_counts() for kind in machine.larger_kinds() if fits(kind, n)][:1]
    ways = ways or [f"{n} x {kind.name}" for kind, n in both]
    remedy = f"Use {' or '.join(ways)}." if ways else "No number of these GPUs holds it: lower max_new_tokens."
    return f"{machine.lacks(model, 'sampling', best.memory_bytes, best.layout)}. {remedy}"


def cannot_train(machine: Machine, student: Student, g: Geometry, train: Train, need_bytes: float) -> str:
    """The sentence for a student that cannot be trained with these settings."""

    def fits(gpu: Gpu, gpus: int, changes: dict[str, object]) -> bool:
        memory = train_memory(g, train.model_copy(update=changes), gpus, student.adapter)
        return sum(memory.values()) <= gpu.memory_bytes

    here, frugal = machine.gpu, _frugal(student)
    ways = [_settings(train, c) for c in _changes(train, student) if fits(here, machine.gpus, c)][:2]
    ways += [f"{n} GPUs" for n in machine.larger_counts() if fits(here, n, {})][:1]
    ways += [f"{machine.gpus} x {kind.name}" for kind in machine.larger_kinds() if fits(kind, machine.gpus, {})][:1]
    if not ways:
        ways += [f"{n} GPUs with {_settings(train, frugal)}" for n in machine.larger_counts() if fits(here, n, frugal)][
            :1
        ]
        kinds = [kind for kind in machine.larger_kinds() if fits(kind, machine.gpus, frugal)][:1]
        ways += [f"{machine.gpus} x {kind.name} with {_settings(train, frugal)}" for kind in kinds]
    remedy = f"Use {' or '.join(ways)}." if ways else "Lower train.max_seq_tokens and train.micro_batch_tokens."
    return f"{machine.lacks(student.name, 'training', need_bytes, f'ZeRO-{train.zero_stage}')}. {remedy}"


def _changes(train: Train, student: Student) -> Iterator[dict[str, object]]:
    """Settings to try, from those that cost least speed to those that cost most, then those that round the state."""
    frugal = _frugal(student)
    stages = range(train.zero_stage + 1, frugal["zero_stage"] + 1)
    yield from ({"zero_stage": stage} for stage in stages)
    if not train.activation_checkpointing:
        yield {"activation_checkpointing": True}
        yield from ({"zero_stage": stage, "activation_checkpointing": True} for stage in stages)
    if train.max_seq_tokens < train.micro_batch_tokens:
        yield {"micro_batch_tokens": train.max_seq_tokens}
        yield {"micro_batch_tokens": train.max_seq_tokens, **frugal}
    if train.offload == "none" and train.optimizer == "adamw" and train.master_weights == "float32":
        yield {**frugal, "offload": "cpu"}
        yield {"activation_checkpointing": True, "optimizer": "adamw8bit"}
        if train.dtype != "float32":
            yield {"activation_checkpointing": True, "optimizer": "adamw8bit", "master_weights": "none"}


def _frugal(student: Student) -> dict[str, int | bool]:
    """What divides and recomputes most; ZeRO-3 cannot divide weights of 4 bits."""
    narrow = student.adapter is not None and student.adapter.kind == "qlora"
    return {"zero_stage": 2 if narrow else 3, "activation_checkpointing": True}


def _settings(train: Train, changes: dict[str, object]) -> str:
    new = {name: value for name, value in changes.items() if getattr(train, name) != value}
    return " and ".join(f"train.{name}={str(value).lower()}" for name, value in new.items())
