"""Every setting: its type, unit, default and bounds. No torch here, so that a wrong config is reported at once.

A config is one YAML file with the sections of `Config`, read by `load_config`. Relative paths are taken from the folder
in which the command runs. Secrets never stand in a config; they come from the environment.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from distill import config_check, config_fields, config_load
from distill.config_geometry import Geometry
from distill.config_students import Student, Train
from distill.config_types import ENV_NAME, NAME, Family, Grader, Int, Section, Ways, setting

STAGES = ("prompts", "traces", "logits", "train", "eval", "publish")


class Run(Section):
    name: str = setting(..., "folder of this run under run.dir", pattern=NAME, use="Use letters, digits, . _ and -.")
    dir: str = setting("runs", "folder that holds all runs", min_length=1)
    seed: Int = setting(0, "seed of sampling, data order and initialisation", ge=0, lt=2**31)


class Hardware(Section):
    device: Literal["auto", "cpu", "cuda"] = setting(
        "auto", "auto takes GPUs where there are any", use="Use cuda for GPUs."
    )
    gpus: Int = setting(1, "devices over all nodes", unit="devices", ge=1)
    gpus_per_node: Int = setting(8, "devices joined by NVLink", unit="devices", ge=1)
    gpu: Literal["h100", "h200", "a100", "l40s", "b200"] = setting("h100", "kind of GPU that the plan assumes")
    price_per_device_hour: float | None = setting(None, "null leaves cost out", unit="currency/hour", ge=0)


class ReasoningGym(Section):
    """Procedural tasks. `families` is {family: prompts} or, with `per_family`, a list; read it as a dict."""

    kind: Literal["reasoning_gym"] = "reasoning_gym"
    families: dict[Family, Annotated[Int, Field(ge=1)]] = setting(
        ..., "prompts of each family, spread evenly over levels", unit="prompts", min_length=1
    )
    per_family: Int | None = setting(None, "prompts of each family when families is a list", unit="prompts", ge=1)
    levels: list[Literal[1, 2, 3]] = setting([1, 2, 3], "difficulty levels to draw from", min_length=1)
    seed: Int = setting(0, "seed of the generator", ge=0, lt=2**31)

    @model_validator(mode="before")
    @classmethod
    def _spread(cls, data: Any) -> Any:
        if not isinstance(data, dict) or not isinstance(data.get("families"), list):
            return data
        names, count = data["families"], data.get("per_family")
        if count is None:
            raise ValueError(
                "families is a list but per_family is missing. Add per_family: 100, or write {family: count}"
            )
        if not all(isinstance(name, str) for name in names) or len(set(names)) != len(names):
            raise ValueError("families must list different names")
        return {**data, "families": dict.fromkeys(names, count)}


class Jsonl(Section):
    """A file with one JSON object a line."""

    kind: Literal["jsonl"] = "jsonl"
    path: str = setting(..., "the file", min_length=1)
    prompt_field: str = setting("problem", "field with the problem")
    answer_field: str = setting("answer", "field with the reference answer")
    grader: Grader = setting("math", "rule that compares an answer with the reference")
    family: str | None = setting(None, "name of this source in tables; null takes the file name")
    limit: Int | None = setting(None, "first rows to take; null takes all", unit="prompts", ge=1)


class HuggingFace(Section):
    """A dataset: a local folder or a Hub id."""

    kind: Literal["hf"] = "hf"
    path: str = setting(..., "folder or Hub id", min_length=1)
    subset: str | None = setting(None, "configuration of the dataset, where it has several")
    split: str = setting("train", "split of the dataset")
    prompt_field: str = setting("problem", "column with the problem")
    answer_field: str = setting("answer", "column with the reference answer")
    grader: Grader = setting("math", "rule that compares an answer with the reference")
    family: str | None = setting(None, "name of this source in tables; null takes the last part of path")
    limit: Int | None = setting(None, "first rows to take; null takes all", unit="prompts", ge=1)


Source = Annotated[ReasoningGym | Jsonl | HuggingFace, Field(discriminator="kind")]


class Prompts(Section):
    train: list[Source] = setting(..., "where training problems come from", min_length=1)
    eval: list[Source] = setting(..., "where held-out problems come from", min_length=1)
    max_train: Int | None = setting(None, "training prompts to keep; null keeps all", unit="prompts", ge=1)


class Sampling(Section):
    n: Int = setting(1, "samples of each training prompt", unit="samples", ge=1)
    temperature: float = setting(0.6, "0 is greedy", ge=0, use="Use 0.6, or 0 for greedy decoding.")
    top_p: float = setting(0.95, "nucleus filter", gt=0, le=1, use="Use 1.0 to switch the filter off.")
    top_k: Int = setting(0, "0 switches the filter off", unit="tokens", ge=0)
    max_new_tokens: Int = setting(2048, "budget of a completion", unit="tokens", ge=1)


class Capture(Section):
    k_max: Int = setting(64, "most likely tokens stored of a position, at most", unit="tokens", ge=1, le=65535)
    tail_bound: float = setting(
        1e-3, "stop adding tokens once the rest weighs less; none under an eighth of it is stored",
        unit="probability", ge=0, lt=1,
    )  # fmt: skip
    tail_draws: Int = setting(
        0, "draws that stand for what is not stored, so that a small k_max biases nothing; 0: its mass alone does",
        unit="draws", ge=0, le=64, use="Use 0, or 4 with a k_max of 16.",
    )  # fmt: skip


class Teacher(Section):
    path: str = setting(..., "folder or Hub id of the checkpoint; with url, of its tokenizer", min_length=1)
    url: str | None = setting(None, "OpenAI-compatible service to sample from", pattern=r"^https?://[^\s/]+")
    token_env: str | None = setting(None, "environment variable that holds the service's token", pattern=ENV_NAME)
    dtype: Literal["auto", "float32", "bfloat16"] = setting("auto", "auto is bfloat16 on GPU, float32 on CPU")
    geometry: Geometry | None = setting(None, "sizes for the plan; null reads config.json in path")
    batch_size: Int = setting(64, "completions in flight on one device, or at url", unit="sequences", ge=1)
    tensor_parallel: Ways = setting(1, "ranks that share attention and dense layers; auto: the plan's", unit="devices")
    expert_parallel: Ways = setting(1, "ranks that share the routed experts; auto: the plan's", unit="devices")
    speculative: Literal["mtp"] | None = setting(
        None, "mtp: draw with the checkpoint's multi-token prediction module; the same tokens, sooner",
        use="Use mtp or null.",
    )  # fmt: skip
    sampling: Sampling = setting(Sampling(), "how traces are drawn")
    capture: Capture | None = setting(Capture(), "teacher distributions to store with traces; null stores none")


class Serve(Section):
    """The teacher as a service (teachers/serve.py). A request beyond a limit is refused with an error that names it."""

    host: str = setting("127.0.0.1", "address to listen on; any but loopback needs token_env", min_length=1)
    port: Int = setting(8000, "0 takes any free port", ge=0, le=65535)
    token_env: str | None = setting(None, "environment variable that holds the token to ask for", pattern=ENV_NAME)
    max_body_bytes: Int = setting(8 << 20, "largest body of a request", unit="bytes", ge=1024, le=1 << 30)
    max_prompt_tokens: Int = setting(32768, "longest prompt", unit="tokens", ge=1)
    max_tokens: Int = setting(32768, "largest budget of a completion", unit="tokens", ge=1)
    max_n: Int = setting(128, "completions, or sequences to score, of one request", unit="sequences", ge=1, le=65536)
    max_top_logprobs: Int = setting(64, "most likely tokens told of a position", unit="tokens", ge=1, le=65534)
    max_waiting: Int = setting(1024, "sequences that may wait for a place; more are told to come back", ge=1)
    drain_s: Int = setting(
        25, "time that running requests get after SIGTERM; the launcher kills after 30", unit="s", ge=0
    )


class Traces(Section):
    verify: bool = setting(True, "keep only traces whose answer is correct")
    max_per_prompt: Int | None = setting(None, "traces kept of a prompt; null keeps all", unit="traces", ge=1)
    shard_prompts: Int = setting(64, "prompts in a shard, the most that an interruption repeats", unit="prompts", ge=1)


class Eval(Section):
    k: Int = setting(4, "samples of each held-out prompt", unit="samples", ge=1, le=1024)
    temperature: float = setting(0.6, "0 is greedy", ge=0, use="Use 0.6, or 0 with k: 1.")
    top_p: float = setting(0.95, "nucleus filter", gt=0, le=1, use="Use 1.0 to switch the filter off.")
    max_new_tokens: Int = setting(2048, "budget of a completion", unit="tokens", ge=1)
    batch_size: Int = setting(64, "completions in flight on one device", unit="sequences", ge=1)
    retention: bool = setting(True, "also measure what the base could do and the student may have lost")
    confidence: float = setting(0.95, "level of the intervals", gt=0.5, lt=1, use="Use 0.95.")
    permutations: Int = setting(10000, "draws of the paired test and of bootstrap intervals", unit="draws", ge=100)


class Tracking(Section):
    wandb: Literal["offline", "online", "disabled"] = setting("offline", "online needs WANDB_API_KEY")
    project: str = setting("distill", "W&B project", min_length=1)
    entity: str | None = setting(None, "W&B user or team; null takes the account's own")


class Publish(Section):
    student: str | None = setting("best", "student to publish: a name, best, or null for none")
    repo: str | None = setting(
        None, "Hub repository to upload to; null writes the folder only", pattern=r"^[\w.-]+/[\w.-]+$"
    )
    private: bool = setting(True, "visibility of a new repository")
    license: str | None = setting(None, "licence identifier on the model card")
    gguf: bool = setting(False, "also write the student as GGUF for llama.cpp; needs the extra gguf")


class Config(Section):
    """One run: what is sampled, from which teacher, into which students, on what machine."""

    run: Run
    hardware: Hardware = Hardware()
    prompts: Prompts
    teacher: Teacher
    serve: Serve = Serve()
    traces: Traces = Traces()
    students: list[Student] = Field(min_length=1)
    train: Train = Train()
    eval: Eval = Eval()
    tracking: Tracking = Tracking()
    publish: Publish = Publish()

    def student(self, name: str) -> Student:
        """The student of that name; KeyError if there is none."""
        return {student.name: student for student in self.students}[name]


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The config of a YAML file with `a.b=c` overrides applied, in order; list items are reached by index.

    Every mistake is collected and raised as one ConfigError: unknown or repeated keys with the nearest name, wrong
    types and bounds, settings that contradict one another, secrets written into the file.
    """
    return config_load.load(Config, str(path), overrides, config_check.cross_check)


def check_machine(config: Config) -> None:
    """Returns if this machine has what the config asks for, else raises one error that lists all that is missing."""
    config_check.check_machine(config)


# What a stage's result does not depend on: moving a run to other hardware must not make its finished stages stale.
_SPEED_ONLY = {
    "teacher": {
        "batch_size", "geometry", "url", "token_env", "tensor_parallel", "expert_parallel", "speculative",
    },
    "train": {
        "micro_batch_tokens", "checkpoint_steps", "keep_checkpoints", "keep_best",
        "zero_stage", "offload", "offload_params", "activation_checkpointing", "compile", "loader_workers",
        "sequence_parallel", "activation_offload", "kept_activations", "mlp_tiles", "eval_steps",
    },
    "eval": {"batch_size"},
}  # fmt: skip


def stage_spec(config: Config, stage: str, student: str | None = None) -> dict[str, Any]:
    """The settings that the result of a stage depends on, as JSON values; stages before it enter by their hashes.

    `train` needs the student's name, so that a change to one student leaves the others finished; so does `text`, what
    the teacher reads of one of train.text_sets, that set's. ValueError for an unknown stage.
    """
    full = config.model_dump(mode="json")
    part = {name: _without(full[name], _SPEED_ONLY.get(name, set())) for name in ("teacher", "train", "eval")}
    seed = {"seed": config.run.seed}
    if stage == "prompts":
        return {"run": seed, "prompts": full["prompts"]}
    if stage in ("traces", "logits"):
        return {"run": seed, "teacher": part["teacher"], "traces": full["traces"]}
    if stage == "text":  # one of train.text_sets, by its name
        each = next(each for each in full["train"]["text_sets"] if each["name"] == student)
        teacher = {key: full["teacher"][key] for key in ("path", "dtype", "capture")}
        own = {key: each[key] for key in ("source", "max_tokens")}
        return {"teacher": teacher, "text": own, "shard": full["traces"]["shard_prompts"]}
    if stage == "train":
        if student is None:
            raise ValueError("stage_spec(config, 'train') needs the student's name")
        own = _without(config.student(student).model_dump(mode="json"), {"geometry"})
        return {"run": seed, "student": own, "train": part["train"]}
    if stage == "eval":
        teacher = {key: part["teacher"][key] for key in ("path", "dtype")}
        students = [{"name": each.name, "path": each.path} for each in config.students]
        return {"run": seed, "teacher": teacher, "students": students, "eval": part["eval"]}
    if stage == "publish":
        return {"publish": full["publish"], "students": [{"name": s.name, "path": s.path} for s in config.students]}
    raise ValueError(f"unknown stage {stage!r}; stages are {', '.join(STAGES)}")


def _without(mapping: dict[str, Any], names: set[str]) -> dict[str, Any]:
    return {key: value for key, value in mapping.items() if key not in names}


def describe() -> str:
    """A table of all settings for `--help-config`: name, type, default, unit, bounds and meaning."""
    return config_fields.table(Config)
