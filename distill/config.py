"""Every setting: its type, unit, default and bounds. No torch here, so that a wrong config is reported at once.

A config is one YAML file with the sections of `Config`, read by `load_config`. Relative paths are taken from the folder
in which the command runs. Secrets never stand in a config; they come from the environment.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator, model_validator

from distill import config_check, config_fields, config_load

NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
ENV_NAME = r"^[A-Za-z_][A-Za-z0-9_]*$"
STAGES = ("prompts", "traces", "logits", "train", "eval", "publish")


def _whole(value: object) -> object:
    """1e5 is a whole number too, though YAML reads it as a float."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Int = Annotated[int, BeforeValidator(_whole)]


def _ways(value: object) -> object:
    whole = _whole(value)
    if whole == "auto" or (isinstance(whole, int) and not isinstance(whole, bool) and whole >= 1):
        return whole
    raise ValueError(f"{value!r} is neither a whole number >= 1 nor auto. Use auto, and the plan chooses")


Ways = Annotated[int | Literal["auto"], PlainValidator(_ways)]

# Names that other modules implement; they stand here too, so that a wrong one is found before anything is imported.
Family = Literal[
    "chain_sum", "basic_arithmetic", "products", "gcd", "simple_equations",
    "leg_counting", "spell_backward", "letter_counting", "count_bits",
]  # fmt: skip
Grader = Literal["exact", "integer", "number", "math"]
Divergence = Literal["forward_kl", "reverse_kl", "jsd", "scaled_jsd", "skew_kl", "total_variation"]


def setting(default: Any, text: str, *, unit: str | None = None, use: str | None = None, **bounds: Any) -> Any:
    """A field with its meaning, its unit, and `use`: what to write instead of a value that is out of bounds."""
    return Field(default, description=text, json_schema_extra={"unit": unit, "use": use}, **bounds)


class Section(BaseModel):
    """Settings that belong together; unknown names are errors and nothing is converted silently."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


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


class Geometry(Section):
    """The sizes of a model, enough to plan without its checkpoint. The second half is for deepseek_v3 only."""

    family: Literal["deepseek_v3", "qwen2", "qwen3", "llama"] = setting(..., "architecture")
    hidden_size: Int = setting(..., "width of the residual stream", ge=1)
    layers: Int = setting(..., "decoder layers", ge=1)
    heads: Int = setting(..., "query heads", ge=1)
    kv_heads: Int | None = setting(None, "key and value heads; null means heads", ge=1)
    head_dim: Int | None = setting(None, "width of a head; null means hidden_size / heads", ge=1)
    intermediate_size: Int = setting(..., "width of a dense MLP", ge=1)
    vocab_size: Int = setting(..., "rows of the embedding, padding included", unit="tokens", ge=2)
    tie_embeddings: bool = setting(False, "the head is the embedding")
    routed_experts: Int | None = setting(None, "routed experts of a layer", ge=1)
    experts_per_token: Int | None = setting(None, "routed experts a token visits", ge=1)
    moe_intermediate_size: Int | None = setting(None, "width of one expert", ge=1)
    shared_experts: Int | None = setting(None, "experts that every token visits", ge=0)
    dense_layers: Int | None = setting(None, "first layers with a dense MLP", ge=0)
    q_lora_rank: Int | None = setting(None, "rank of the query projection; null means full", ge=1)
    kv_lora_rank: Int | None = setting(None, "rank of the latent key-value cache", ge=1)
    qk_rope_head_dim: Int | None = setting(None, "rotary part of a key head", ge=1)
    qk_nope_head_dim: Int | None = setting(None, "part of a key head without position", ge=1)
    v_head_dim: Int | None = setting(None, "width of a value head", ge=1)


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


class Teacher(Section):
    path: str = setting(..., "folder or Hub id of the checkpoint; with url, of its tokenizer", min_length=1)
    url: str | None = setting(None, "OpenAI-compatible service to sample from", pattern=r"^https?://[^\s/]+")
    token_env: str | None = setting(None, "environment variable that holds the service's token", pattern=ENV_NAME)
    dtype: Literal["auto", "float32", "bfloat16"] = setting("auto", "auto is bfloat16 on GPU, float32 on CPU")
    geometry: Geometry | None = setting(None, "sizes for the plan; null reads config.json in path")
    batch_size: Int = setting(64, "completions in flight on one device, or at url", unit="sequences", ge=1)
    tensor_parallel: Ways = setting(1, "ranks that share attention and dense layers; auto: the plan's", unit="devices")
    expert_parallel: Ways = setting(1, "ranks that share the routed experts; auto: the plan's", unit="devices")
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
    "teacher": {"batch_size", "geometry", "url", "token_env", "tensor_parallel", "expert_parallel"},
    "train": {
        "micro_batch_tokens", "checkpoint_steps", "keep_checkpoints",
        "zero_stage", "offload", "activation_checkpointing", "compile",
    },
    "eval": {"batch_size"},
}  # fmt: skip


def stage_spec(config: Config, stage: str, student: str | None = None) -> dict[str, Any]:
    """The settings that the result of a stage depends on, as JSON values; stages before it enter by their hashes.

    `train` needs the student's name, so that a change to one student leaves the others finished. ValueError for an
    unknown stage.
    """
    full = config.model_dump(mode="json")
    part = {name: _without(full[name], _SPEED_ONLY.get(name, set())) for name in ("teacher", "train", "eval")}
    seed = {"seed": config.run.seed}
    if stage == "prompts":
        return {"run": seed, "prompts": full["prompts"]}
    if stage in ("traces", "logits"):
        return {"run": seed, "teacher": part["teacher"], "traces": full["traces"]}
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
