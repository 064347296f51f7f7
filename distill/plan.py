"""What a config will take: memory per GPU, tokens, operations, hours, cost and disk of every stage.

Nothing is started, downloaded or loaded. The sizes of a model come from its `geometry` in the config or, without one,
from the config.json in its folder.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from distill.capacity import (
    ASSUMED,
    GPUS,
    Gpu,
    Load,
    Placement,
    longest_row,
    place,
    score_seconds,
    teacher_element,
    train_memory,
    train_seconds,
)
from distill.config import Config, Geometry, Source, Student
from distill.errors import ConfigError
from distill.geometry import forward_flops, parameters, read_geometry, train_flops
from distill.plan_advice import Machine, cannot_sample, cannot_train
from distill.plan_text import render
from distill.split import Split
from distill.state_bytes import element_bytes, state_bytes

MEAN_SHARE = 0.25
PROMPT_TOKENS = 200
TRACE_BYTES = 8
ENTRY_BYTES = 2.5
POSITION_BYTES = 12

LENGTHS_ASSUMED = (
    f"a completion takes {MEAN_SHARE:.0%} of its token budget on average, a prompt {PROMPT_TOKENS} tokens "
    "(not measured)",
    "every sampled trace is kept and trained on: verification only makes training shorter",
    f"a token takes {TRACE_BYTES} bytes in a trace, and as many while a student trains on it; a stored position "
    f"{POSITION_BYTES} bytes and {ENTRY_BYTES} for each of at most k_max entries; a checkpoint is what is "
    "trained and its optimizer's state",
    "loading of models, grading and the tail of a stage, when few sequences are left, are not counted",
    "routed experts that are stored in FP8 stay in it on H100, H200, L40S and B200, and are widened as they are loaded "
    "on A100; products are computed in bfloat16",
)


@dataclass(frozen=True)
class Row:
    """One model in one stage. Bytes are on each GPU, hours are wall hours with all GPUs, cost is hours x GPUs x price.

    Hours, GPU hours and cost are None where the model does not fit; cost also where no price is known.
    """

    stage: str
    model: str
    parameters: int
    active_parameters: int
    tokens: float
    flops: float
    hours: float | None
    gpu_hours: float | None
    cost: float | None
    memory: dict[str, float]
    fits: bool
    layout: str

    @property
    def memory_bytes(self) -> float:
        return sum(self.memory.values())


@dataclass(frozen=True)
class TeacherRow:
    """The traces stage with the teacher's weights kept in `weights`; the fields are those of Row."""

    weights: str
    layout: str
    memory: dict[str, float]
    fits: bool
    tokens_per_s: float | None
    hours: float | None
    gpu_hours: float | None
    cost: float | None

    @property
    def memory_bytes(self) -> float:
        return sum(self.memory.values())


@dataclass(frozen=True)
class Plan:
    """The stages of one config on `gpus` GPUs of a kind; `problems` says what does not fit and what to change."""

    name: str
    gpu: str
    gpus: int
    gpus_per_node: int
    gpu_memory_bytes: float
    price_per_device_hour: float | None
    rows: list[Row]
    teacher: list[TeacherRow]
    disk: dict[str, float]
    problems: list[str]
    notes: list[str] = field(default_factory=list)
    assumed: tuple[str, ...] = (*ASSUMED, *LENGTHS_ASSUMED)

    @property
    def fits(self) -> bool:
        return all(row.fits for row in self.rows)

    @property
    def hours(self) -> float | None:
        return sum(row.hours for row in self.rows) if self.fits else None

    @property
    def cost(self) -> float | None:
        return sum(row.cost for row in self.rows) if self.fits and self.price_per_device_hour is not None else None

    def render(self) -> str:
        """The plan as aligned plain text."""
        return render(self)

    def to_json(self) -> str:
        """The plan as one JSON object: the fields of Plan and Row, with bytes, hours and counts as numbers."""
        rows, teacher = (
            [asdict(row) | {"memory_bytes": row.memory_bytes} for row in table] for table in (self.rows, self.teacher)
        )
        totals = {"fits": self.fits, "hours": self.hours, "cost": self.cost}
        return json.dumps(asdict(self) | {"rows": rows, "teacher": teacher} | totals, indent=2)


def plan(config: Config, gpus: int | None = None, gpu: str | None = None) -> Plan:
    """The plan of a config on its own hardware, or on `gpus` GPUs of kind `gpu`.

    ConfigError for an unknown kind, a count that is not whole nodes, or a prompt source of unknown size; ModelError
    for a model whose sizes are neither in the config nor in its folder.
    """
    return _Planner(config, *_machine(config, gpus, gpu)).plan()


def teacher_split(config: Config, rank: int, world: int) -> Split:
    """The place of this rank of a run of `world` ranks in the teacher that the config asks for.

    Where the config says auto, the plan's placement on `world` of its GPUs. ConfigError when they cannot be laid out.
    """
    teacher = config.teacher
    if teacher.url:
        return Split(rank=rank, world=world)
    if teacher.tensor_parallel != "auto":
        return Split(teacher.tensor_parallel, teacher.expert_parallel, rank, world)
    geometry = teacher.geometry or read_geometry(teacher.path, "teacher.path")
    element = teacher_element(geometry, GPUS[config.hardware.gpu], teacher.dtype)
    return _fastest(config, geometry, element, teacher.sampling.max_new_tokens, teacher.batch_size, rank, world)


def student_split(config: Config, folder: str | Path, dtype: str, rank: int, world: int) -> Split:
    """The place of this rank of a run of `world` GPUs in a base or student that is evaluated, as the plan has it."""
    geometry = read_geometry(folder, "students.path")
    settings = config.eval
    return _fastest(config, geometry, element_bytes(dtype), settings.max_new_tokens, settings.batch_size, rank, world)


def _fastest(config: Config, geometry: Geometry, element: int, new: int, batch: int, rank: int, world: int) -> Split:
    gpu, node = GPUS[config.hardware.gpu], config.hardware.gpus_per_node
    load = Load(PROMPT_TOKENS, MEAN_SHARE * new, new, batch, batch * world)
    placement = place(geometry, gpu, world, node, load, element)
    return Split(placement.tensor_parallel, placement.expert_parallel, rank, world)


def _machine(config: Config, gpus: int | None, gpu: str | None) -> tuple[Gpu, int]:
    kind, node = gpu or config.hardware.gpu, config.hardware.gpus_per_node
    count = config.hardware.gpus if gpus is None else gpus
    if kind not in GPUS:
        raise ConfigError(f"--gpu is {kind!r}; it must be one of {', '.join(GPUS)}", remedy=f"Use {next(iter(GPUS))}.")
    if count < 1:
        raise ConfigError(f"--gpus is {count}; it must be >= 1", remedy=f"Use {node}.")
    if count > node and count % node:
        remedy = f"Use {count // node * node}, or set hardware.gpus_per_node."
        raise ConfigError(f"--gpus is {count}; beyond one node it must be a multiple of {node}", remedy=remedy)
    return GPUS[kind], count


class _Planner:
    def __init__(self, config: Config, gpu: Gpu, gpus: int):
        self.config, self.gpu, self.gpus = config, gpu, gpus
        self.node = config.hardware.gpus_per_node
        self.machine = Machine(gpu, gpus, self.node)
        self.problems: list[str] = []
        self.notes: list[str] = []
        self.train_prompts = count_prompts(config, "train")
        self.eval_prompts = count_prompts(config, "eval")

    def plan(self) -> Plan:
        config = self.config
        rows = [*self.trace_rows(), *self.train_rows(), *self.eval_rows()]
        if config.hardware.device == "cpu":
            self.notes.append(f"hardware.device is cpu, but the figures are for {self.gpu.name}: a CPU is not planned.")
        price = config.hardware.price_per_device_hour
        machine = (self.gpu.name, self.gpus, self.node, self.gpu.memory_bytes, price)
        problems, notes = list(dict.fromkeys(self.problems)), list(dict.fromkeys(self.notes))
        return Plan(config.run.name, *machine, rows, list(self.teacher_rows()), self.disk(), problems, notes)

    # What is sampled and trained on

    @property
    def samples(self) -> int:
        return self.train_prompts * self.config.teacher.sampling.n

    @property
    def traces(self) -> int:
        """Traces that training reads, if all survive verification."""
        kept = self.config.traces.max_per_prompt or self.config.teacher.sampling.n
        return self.train_prompts * min(kept, self.config.teacher.sampling.n)

    def load(self, max_new_tokens: int, batch_size: int, samples: int) -> Load:
        return Load(PROMPT_TOKENS, MEAN_SHARE * max_new_tokens, max_new_tokens, batch_size, samples)

    # Stages

    def trace_rows(self) -> Iterator[Row]:
        teacher, load = self.config.teacher, self.trace_load
        if teacher.url:
            self.notes.append(f"The teacher answers at {teacher.url}: its GPUs, hours and cost are not in this plan.")
            return
        yield self.sampling_row("traces", "teacher", self.teacher_geometry(), 0.0, load, teacher.dtype)

    def teacher_rows(self) -> Iterator[TeacherRow]:
        """The traces stage by the dtype of the teacher's weights; FP8 where checkpoint and GPU have it."""
        teacher, price = self.config.teacher, self.config.hardware.price_per_device_hour
        if teacher.url:
            return
        g, load = self.teacher_geometry(), self.trace_load
        dtypes = {"float32" if teacher.dtype == "float32" else "bfloat16": element_bytes(teacher.dtype)}
        for name, element in (
            dtypes | ({"float8 experts": 1} if teacher_element(g, self.gpu, teacher.dtype) == 1 else {})
        ).items():
            placement = self.place(g, load, element, self.teacher_ways)
            hours = self.sampling_seconds(g, placement, load, 0.0, element) / 3600 if placement.fits else None
            gpu_hours = hours * self.gpus if placement.fits else None
            cost = gpu_hours * price if placement.fits and price is not None else None
            rate = placement.tokens_per_s if placement.fits else None
            yield TeacherRow(name, placement.layout, placement.memory, placement.fits, rate, hours, gpu_hours, cost)

    def train_rows(self) -> Iterator[Row]:
        for i, student in enumerate(self.config.students):
            yield self.train_row(student, self.student_geometry(i))

    def eval_rows(self) -> Iterator[Row]:
        config, settings = self.config, self.config.eval
        load = self.load(settings.max_new_tokens, settings.batch_size, self.eval_prompts * settings.k)
        # Agreement: teacher and students score the teacher's own traces of the held-out prompts.
        scored = self.eval_prompts * (load.prompt_tokens + load.mean_new_tokens)
        if not config.teacher.url:
            yield self.sampling_row("eval", "teacher", self.teacher_geometry(), scored, load, config.teacher.dtype)
        seen: set[str] = set()
        for i, student in enumerate(config.students):
            geometry = self.student_geometry(i)
            if student.path not in seen:
                name = f"base {Path(student.path).name}"
                yield self.sampling_row("eval", name, geometry, scored, load, config.train.dtype)
            seen.add(student.path)
            yield self.sampling_row("eval", student.name, geometry, scored, load, config.train.dtype)

    def sampling_row(self, stage: str, model: str, g: Geometry, scored: float, load: Load, dtype: str) -> Row:
        element, ways = teacher_element(g, self.gpu, dtype), self.teacher_ways if model == "teacher" else None
        placement = self.place(g, load, element, ways)
        tokens = load.samples * (load.mean_new_tokens + load.prompt_tokens) + scored
        flops = tokens * forward_flops(g, (load.prompt_tokens + load.mean_new_tokens) / 2)
        seconds = self.sampling_seconds(g, placement, load, scored, element)
        if not placement.fits and not any(p.startswith(f"{model}:") for p in self.problems):
            self.problems.append(cannot_sample(self.machine, model, g, load, element, placement, ways is not None))
        return self.row(stage, model, g, tokens, flops, seconds, placement.memory, placement.fits, placement.layout)

    def place(self, g: Geometry, load: Load, element: int, ways: tuple[int, int] | None) -> Placement:
        return place(g, self.gpu, self.gpus, self.node, load, element, ways)

    def sampling_seconds(self, g: Geometry, placement: Placement, load: Load, scored: float, element: int) -> float:
        """Wall seconds of prefill and decoding of the load, and of `scored` tokens besides."""
        read = load.samples * load.prompt_tokens + scored
        length = load.prompt_tokens + load.mean_new_tokens
        decoding = load.samples * load.mean_new_tokens / placement.tokens_per_s
        return decoding + score_seconds(g, read, length, self.gpus, self.gpu, element)

    def train_row(self, student: Student, g: Geometry) -> Row:
        train, new = self.config.train, self.config.teacher.sampling.max_new_tokens
        tokens = self.traces * (PROMPT_TOKENS + MEAN_SHARE * new) * train.epochs
        memory = train_memory(g, train, self.gpus, student.adapter)
        fits = sum(memory.values()) <= self.gpu.memory_bytes
        if not fits:
            self.problems.append(cannot_train(self.machine, student, g, train, sum(memory.values())))
        rows = train.batch_tokens // train.micro_batch_tokens * train.sequence_parallel
        if rows < self.gpus:
            each = train.micro_batch_tokens // train.sequence_parallel
            fed = f"train.batch_tokens feeds {rows} GPUs with {each} tokens each"
            self.notes.append(f"{fed}; {self.gpus - rows} stand idle in training.")
        length = tokens / (self.traces * train.epochs)  # traces of a packed row do not attend to one another
        if train.general is not None:
            tokens /= 1 - train.general.share
        if train.trace_sets:
            self.notes.append("train.trace_sets: traces of other runs come on top of the tokens of training here.")
        if train.text_sets:
            self.notes.append("train.text_sets: the teacher reads them once; their tokens come on top of those here.")
        if train.on_policy is not None:
            count, rounds = train.on_policy.prompts or "all", train.on_policy.rounds
            what = f"{rounds} round{'s' * (rounds > 1)} of {count} prompts"
            self.notes.append(f"train.on_policy: {what}, sampled, read and trained on, come on top of the hours here.")
        seconds = train_seconds(g, train, tokens, length, self.gpus, self.node, self.gpu)
        flops = tokens * train_flops(g, length)
        layout = f"ZeRO-{train.zero_stage}" + (f", {train.offload} offload" if train.offload != "none" else "")
        layout += f", weights on {train.offload_params}" if train.offload_params != "none" else ""
        layout += f", {student.adapter.kind}" if student.adapter is not None else ""
        if fits:
            layout += f", rows up to {longest_row(g, train, self.gpus, self.gpu, student.adapter) // 1024:,}k tokens"
        return self.row("train", student.name, g, tokens, flops, seconds, memory, fits, layout)

    def row(
        self, stage: str, model: str, g: Geometry, tokens: float, flops: float, seconds: float, memory: dict,
        fits: bool, layout: str,
    ) -> Row:  # fmt: skip
        count, price = parameters(g), self.config.hardware.price_per_device_hour
        hours = seconds / 3600 if fits else None
        gpu_hours = hours * self.gpus if fits else None
        cost = gpu_hours * price if fits and price is not None else None
        sizes = (count.total, count.active)
        return Row(stage, model, *sizes, tokens, flops, hours, gpu_hours, cost, memory, fits, layout)

    def disk(self) -> dict[str, float]:
        """Bytes in the run folder, at most, by what they hold."""
        teacher, train = self.config.teacher, self.config.train
        tokens = self.samples * MEAN_SHARE * teacher.sampling.max_new_tokens
        students = [(self.student_geometry(i), student.adapter) for i, student in enumerate(self.config.students)]
        counts = [parameters(g).total for g, _ in students]
        trainings = 1 if train.on_policy is None else 1 + train.on_policy.rounds  # each keeps what it wrote
        each = [state_bytes(g, train, adapter).checkpoint for g, adapter in students]
        kept = trainings * (train.keep_checkpoints + train.keep_best)
        checkpoints = kept * sum(each) + max(each)  # the next one is whole before the oldest goes
        disk = {"2-traces": tokens * TRACE_BYTES}
        if teacher.capture is not None:
            disk["3-logits"] = tokens * (
                POSITION_BYTES + ENTRY_BYTES * (teacher.capture.k_max + teacher.capture.tail_draws)
            )
        disk["4-student"] = checkpoints + trainings * sum(counts) * element_bytes(train.dtype) + tokens * TRACE_BYTES
        if self.config.publish.student is not None:
            disk["6-publish"] = float(max(counts) * element_bytes(train.dtype))
        return disk

    # Models

    @property
    def trace_load(self) -> Load:
        teacher = self.config.teacher
        return self.load(teacher.sampling.max_new_tokens, teacher.batch_size, self.samples)

    @property
    def teacher_ways(self) -> tuple[int, int] | None:
        """(tensor parallel, expert parallel) as the config has them; None where the plan chooses."""
        teacher = self.config.teacher
        return None if teacher.tensor_parallel == "auto" else (teacher.tensor_parallel, teacher.expert_parallel)

    def teacher_geometry(self) -> Geometry:
        return self.config.teacher.geometry or read_geometry(self.config.teacher.path, "teacher.path")

    def student_geometry(self, i: int) -> Geometry:
        student = self.config.students[i]
        return student.geometry or read_geometry(student.path, f"students.{i}.path")


def count_prompts(config: Config, side: str) -> int:
    """Prompts that the sources of one side give at most; ConfigError if the size of one is not known."""
    sources = config.prompts.train if side == "train" else config.prompts.eval
    total = sum(_count(source, f"prompts.{side}.{i}") for i, source in enumerate(sources))
    return min(total, config.prompts.max_train or total) if side == "train" else total


def _count(source: Source, where: str) -> int:
    if source.kind == "reasoning_gym":
        return sum(source.families.values())
    if source.limit is not None:
        return source.limit
    if source.kind == "jsonl" and Path(source.path).is_file():
        with open(source.path, "rb") as lines:
            return sum(1 for line in lines if line.strip())
    raise ConfigError(f"{where}.limit is null, so the number of its prompts is not known", remedy=f"Set {where}.limit.")
