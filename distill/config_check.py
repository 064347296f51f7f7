"""What no single setting shows: settings that contradict one another, and what this machine must have.

Every check returns its problems, so that a user sees all of them before any work starts.
"""

from __future__ import annotations

import ipaddress
import json
import netrc
import os
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from distill.checkpoints import check_checkpoint
from distill.config_addresses import address_problems, wrong_url
from distill.config_load import Loc, Origin, Problem, summary
from distill.config_mixture import missing_for_mixture, mixture_problems
from distill.config_optimizer import missing_for_optimizer, optimizer_problems
from distill.config_positions import misfit_for_positions
from distill.config_sequence import misfit_for_sequence, sequence_problems
from distill.errors import CapacityError, ConfigError, DistillError, ModelError, ServiceError
from distill.split import expert_problems, tensor_problems, ways_problems

if TYPE_CHECKING:
    from distill.config import Config, Geometry

RESERVED_NAMES = ("teacher", "base", "best")  # rows of the tables, and a value of publish.student
MLA_SIZES = ("kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim")
MOE_SIZES = ("routed_experts", "experts_per_token", "moe_intermediate_size", "shared_experts", "dense_layers")


def cross_check(config: Config, origin: Origin) -> list[Problem]:
    """Problems of a config whose single settings are valid: one sentence each, with the remedy."""
    checks = (
        _tokens, _sampling, _students, optimizer_problems, mixture_problems, sequence_problems, _evaluation,
        _publishing, address_problems, _service, _hardware, _geometries, _sharding, _speculation,
    )  # fmt: skip
    return [problem for check in checks for problem in check(config, origin)]


def _problem(origin: Origin, first: Loc, value: object, must: str, *others: Loc) -> Problem:
    return Problem((first, *others), f"{origin.name(first)} is {value}; {must}")


def _tokens(config: Config, origin: Origin) -> Iterator[Problem]:
    row, micro, batch = ("train", "max_seq_tokens"), ("train", "micro_batch_tokens"), ("train", "batch_tokens")
    train, new = config.train, config.teacher.sampling.max_new_tokens
    if train.max_seq_tokens > train.micro_batch_tokens:
        must = f"a packed row must fit into train.micro_batch_tokens, {train.micro_batch_tokens}. Raise that."
        yield _problem(origin, row, train.max_seq_tokens, must, micro)
    if train.micro_batch_tokens > train.batch_tokens:
        must = f"it must be <= train.batch_tokens, {train.batch_tokens}. Lower one or raise the other."
        yield _problem(origin, micro, train.micro_batch_tokens, must, batch)
    if new >= train.max_seq_tokens and "too_long" not in train.model_fields_set:
        must = f"it must be < train.max_seq_tokens, {train.max_seq_tokens}, to leave room for the prompt. Lower it, "
        must += "or set train.too_long to say what becomes of longer traces: drop or split."
        yield _problem(origin, ("teacher", "sampling", "max_new_tokens"), new, must, row)


def _sampling(config: Config, origin: Origin) -> Iterator[Problem]:
    teacher, held_out = config.teacher.sampling, config.eval
    for loc, temperature, count, name in (
        (("teacher", "sampling", "n"), teacher.temperature, teacher.n, "teacher.sampling.temperature"),
        (("eval", "k"), held_out.temperature, held_out.k, "eval.temperature"),
    ):
        if temperature == 0 and count > 1:
            must = f"greedy samples of a prompt are all the same. Use 1, or raise {name} above 0."
            yield _problem(origin, loc, count, must, tuple(name.split(".")))


def _students(config: Config, origin: Origin) -> Iterator[Problem]:
    first: dict[str, int] = {}
    for i, student in enumerate(config.students):
        name, alpha = ("students", i, "name"), ("students", i, "loss", "alpha")
        if student.name in RESERVED_NAMES:
            yield _problem(origin, name, repr(student.name), "that name is taken by the tables. Use another.")
        if first.setdefault(student.name, i) != i:
            must = f"students.{first[student.name]} has that name too. Give each student its own."
            yield _problem(origin, name, repr(student.name), must)
        if student.loss.kind == "response" and student.loss.alpha > 0:
            must = "with kind response there is no divergence to weigh. Use 0, or kind: logits."
            yield _problem(origin, alpha, student.loss.alpha, must, ("students", i, "loss", "kind"))
        if student.loss.kind == "logits" and student.loss.alpha == 0:
            must = "with kind logits it must be > 0. Use 0.9, or kind: response to learn from the text alone."
            yield _problem(origin, alpha, student.loss.alpha, must, ("students", i, "loss", "kind"))
        if student.loss.target == "sampling":
            at, temperature = ("students", i, "loss", "target"), config.teacher.sampling.temperature
            if student.loss.kind == "response":
                must = "with kind response the text alone is learned. Leave it out, or use kind: logits."
                yield _problem(origin, at, "'sampling'", must, ("students", i, "loss", "kind"))
            elif temperature > 1:
                must = "traces drawn hotter than 1 have a law that no stored part tells. Use target: teacher."
                yield _problem(origin, at, "'sampling'", must, ("teacher", "sampling", "temperature"))
            elif config.teacher.capture and config.teacher.capture.tail_draws:
                must = "draws from a tail stand for the teacher's distribution alone. Use target: teacher."
                yield _problem(origin, at, "'sampling'", must, ("teacher", "capture", "tail_draws"))
        if not _mixes(student.loss.divergence, student.loss.beta):
            must = f"with {student.loss.divergence} the loss would be 0 for every student or infinite. Use 0.5."
            yield _problem(origin, ("students", i, "loss", "beta"), student.loss.beta, must)
        if student.loss.kind == "logits" and config.teacher.capture is None:
            must = "but teacher.capture is null, so no distribution would be stored. Set teacher.capture.k_max: 64."
            yield _problem(origin, ("students", i, "loss", "kind"), "'logits'", must, ("teacher", "capture"))


def _mixes(divergence: str, beta: float) -> bool:
    """Whether the divergence is defined with this mixture weight; the others do not read it."""
    return {"jsd": 0 < beta < 1, "skew_kl": beta < 1}.get(divergence, True)


def _evaluation(config: Config, origin: Origin) -> Iterator[Problem]:
    level = 1 - config.eval.confidence
    fewest = round(20 / level)  # 20 draws in the tail that an interval cuts off
    if config.eval.permutations < fewest:
        must = f"an interval at eval.confidence {config.eval.confidence} needs {fewest} or more."
        locs = ("eval", "permutations"), ("eval", "confidence")
        yield _problem(origin, locs[0], config.eval.permutations, must, locs[1])


def _publishing(config: Config, origin: Origin) -> Iterator[Problem]:
    publish, names = config.publish, [student.name for student in config.students]
    if publish.student not in (None, "best", *names):
        must = f"it must be one of best, {', '.join(names)}, or null."
        yield _problem(origin, ("publish", "student"), repr(publish.student), must, ("students",))
    if publish.repo and publish.student is None:
        must = "but publish.student is null, so there is nothing to upload. Name a student, or best."
        yield _problem(origin, ("publish", "repo"), repr(publish.repo), must, ("publish", "student"))
    if publish.gguf and publish.student is None:
        must = "but publish.student is null, so there is nothing to write. Name a student, or best."
        yield _problem(origin, ("publish", "gguf"), "true", must, ("publish", "student"))
    llama = (publish.license or "").lower().startswith("llama")
    if publish.repo and llama and not publish.repo.split("/")[1].startswith("Llama"):
        must = "the Llama licence wants the name of a derived model to start with Llama. Use ORG/Llama-..."
        yield _problem(origin, ("publish", "repo"), repr(publish.repo), must, ("publish", "license"))


def _service(config: Config, origin: Origin) -> Iterator[Problem]:
    teacher = config.teacher
    if teacher.url and not (wrong_url(teacher.url) or is_loopback(teacher.url) or teacher.token_env):
        must = "a service on another machine must ask for a token. Set teacher.token_env to the variable that holds it."
        yield _problem(origin, ("teacher", "url"), repr(teacher.url), must, ("teacher", "token_env"))
    if teacher.token_env and not teacher.url:
        must = "but teacher.url is null, so no service is asked. Set teacher.url, or remove token_env."
        yield _problem(origin, ("teacher", "token_env"), repr(teacher.token_env), must, ("teacher", "url"))
    if not is_loopback(f"http://{_bracketed(config.serve.host)}") and config.serve.token_env is None:
        must = "a service that other machines reach must ask for a token. Set serve.token_env, or use host: 127.0.0.1."
        yield _problem(origin, ("serve", "host"), repr(config.serve.host), must, ("serve", "token_env"))


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _hardware(config: Config, origin: Origin) -> Iterator[Problem]:
    gpus, node = config.hardware.gpus, config.hardware.gpus_per_node
    if gpus > node and gpus % node:
        must = f"beyond one node it must be a multiple of hardware.gpus_per_node, {node}. Use {gpus // node * node}."
        yield _problem(origin, ("hardware", "gpus"), gpus, must, ("hardware", "gpus_per_node"))


def _geometries(config: Config, origin: Origin) -> Iterator[Problem]:
    places: list[tuple[Loc, Geometry | None]] = [(("teacher", "geometry"), config.teacher.geometry)]
    places += [(("students", i, "geometry"), student.geometry) for i, student in enumerate(config.students)]
    for loc, geometry in places:
        if geometry is not None:
            yield from _geometry(geometry, loc, origin)
            if loc[0] == "students" and geometry.family == "deepseek_v3":
                must = "a student is dense. Use qwen2, qwen3 or llama."
                yield _problem(origin, (*loc, "family"), "'deepseek_v3'", must)


def _geometry(g: Geometry, loc: Loc, origin: Origin) -> Iterator[Problem]:
    for name in (*MLA_SIZES, *MOE_SIZES):
        value, moe = getattr(g, name), g.family == "deepseek_v3"
        if moe and value is None:
            remedy = "family deepseek_v3 needs it. Copy it from the model's config.json."
            yield Problem(((*loc, name),), f"{origin.name((*loc, name))} is missing; {remedy}")
        if not moe and value is not None:
            yield _problem(origin, (*loc, name), value, f"family {g.family} has no such size. Remove it.")
    for name, wrong, must in (
        ("heads", g.head_dim is None and g.hidden_size % g.heads, f"must divide hidden_size, {g.hidden_size}"),
        ("kv_heads", g.heads % (g.kv_heads or 1), f"must divide heads, {g.heads}"),
        ("experts_per_token", (g.experts_per_token or 0) > (g.routed_experts or 0), "must be <= routed_experts"),
        ("dense_layers", (g.dense_layers or 0) > g.layers, f"must be <= layers, {g.layers}"),
    ):
        if wrong:
            yield _problem(origin, (*loc, name), getattr(g, name), f"it {must}. Copy it from the model's config.json.")


def _sharding(config: Config, origin: Origin) -> Iterator[Problem]:
    teacher, gpus, node = config.teacher, config.hardware.gpus, config.hardware.gpus_per_node
    tensor, expert = ("teacher", "tensor_parallel"), ("teacher", "expert_parallel")
    ways = {tensor: teacher.tensor_parallel, expert: teacher.expert_parallel}
    if teacher.url is not None:
        return
    if "auto" in ways.values():
        if set(ways.values()) != {"auto"}:
            must = "teacher.tensor_parallel and teacher.expert_parallel are auto together. Set both, or neither."
            yield _problem(origin, tensor, ways[tensor], must, expert)
        return
    for problem in ways_problems(*ways.values(), gpus):
        locs = (tensor, expert) if ways[tensor] >= ways[expert] else (expert, tensor)
        must = f"{problem} (hardware.gpus is {gpus}). Use divisors, or auto for both."
        yield _problem(origin, locs[0], ways[locs[0]], must, locs[1])
    if ways[tensor] > node:
        must = f"it must stay within a node, hardware.gpus_per_node is {node}. Lower it."
        yield _problem(origin, tensor, ways[tensor], must, ("hardware", "gpus_per_node"))
    if teacher.geometry is not None:
        for loc, problem in _cuts(config, _sizes(teacher.geometry)):
            yield _problem(origin, loc, ways[loc], f"{problem}.")


def _speculation(config: Config, origin: Origin) -> Iterator[Problem]:
    teacher, loc = config.teacher, ("teacher", "speculative")
    if teacher.speculative is None:
        return
    if teacher.url is not None:
        must = "teacher.url is set, and its service draws as it was started to. Leave it out here."
        yield _problem(origin, loc, teacher.speculative, must, ("teacher", "url"))
    elif (teacher.tensor_parallel, teacher.expert_parallel) != (1, 1):
        must = "it needs a whole model on each device: teacher.tensor_parallel and teacher.expert_parallel of 1."
        yield _problem(origin, loc, teacher.speculative, must, ("teacher", "tensor_parallel"))
    elif teacher.geometry is not None and teacher.geometry.family != "deepseek_v3":
        must = "only family deepseek_v3 has the module. Set it to null."
        yield _problem(origin, loc, teacher.speculative, must, ("teacher", "geometry", "family"))


def _cuts(config: Config, sizes: Mapping[str, object]) -> Iterator[tuple[Loc, str]]:
    """The setting and the problem wherever a teacher of these sizes cannot be split as the config says."""
    for name, problems in (("tensor_parallel", tensor_problems), ("expert_parallel", expert_problems)):
        ways = getattr(config.teacher, name)
        if ways != "auto":
            yield from ((("teacher", name), problem) for problem in problems(sizes, ways))


def _sizes(g: Geometry) -> dict[str, object]:
    """A geometry under the names of config.json."""
    return {
        "model_type": g.family,
        "num_attention_heads": g.heads,
        "num_key_value_heads": g.kv_heads or g.heads,
        "intermediate_size": g.intermediate_size,
        "moe_intermediate_size": g.moe_intermediate_size,
        "n_routed_experts": g.routed_experts,
    }


# --- The machine ---------------------------------------------------------------------


def check_machine(config: Config, environment: Mapping[str, str] = os.environ) -> None:
    """Returns if the machine has all that the config asks for; one error with all that is missing otherwise.

    CapacityError for GPUs, ModelError for checkpoints, ServiceError for tokens, DataError and StoreError for what is
    mixed into the traces; the class of the first if several.
    Takes seconds at most: nothing is downloaded and no weight is read.
    """
    found = [*_gpu_errors(config), *_checkpoint_errors(config, environment), *_token_errors(config, environment)]
    found += [*_split_errors(config), *missing_for_optimizer(config), *missing_for_mixture(config)]
    found += [*misfit_for_sequence(config), *misfit_for_positions(config)]
    if len(found) == 1:
        raise found[0]
    if found:
        raise type(found[0])(summary("this machine", [str(error) for error in found]))


def _gpu_errors(config: Config) -> Iterator[DistillError]:
    want = config.hardware
    if want.device != "cuda":
        return
    have, here = visible_gpus(), min(want.gpus, want.gpus_per_node)
    if have < here:  # per node: the launcher starts as many processes on each
        yield CapacityError(
            f"hardware.device is cuda and this node should have {here} GPU(s), but it has {have}",
            remedy="Run on a GPU machine, lower hardware.gpus, or use --set hardware.device=cpu for a small model.",
        )


def visible_gpus() -> int:
    """GPUs that this process may use."""
    torch = import_module("torch")  # only a run that asks for GPUs pays for it: this module must import without
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _checkpoint_errors(config: Config, environment: Mapping[str, str]) -> Iterator[DistillError]:
    places = [("teacher.path", config.teacher.path)] if config.teacher.url is None else []
    places += [(f"students.{i}.path", student.path) for i, student in enumerate(config.students)]
    offline = environment.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    seen: dict[str, str] = {}
    for name, path in places:
        if seen.setdefault(path, name) == name and (error := _checkpoint_error(name, path, offline, environment)):
            yield error


def _checkpoint_error(name: str, path: str, offline: bool, environment: Mapping[str, str]) -> DistillError | None:
    folder = Path(path)
    if folder.is_dir():
        return _folder_error(name, folder)
    if not is_hub_id(path):
        return ModelError(
            f"{name} is {path}, and there is no such folder",
            remedy="Give a checkpoint folder or a Hub id such as org/model.",
        )
    if offline and not _is_cached(path, environment):
        remedy = "Unset HF_HUB_OFFLINE, or copy the checkpoint here and give its folder."
        return ModelError(
            f"{name} is {path}: no such folder, not in the Hub cache, and HF_HUB_OFFLINE is set", remedy=remedy
        )
    return None


def _split_errors(config: Config) -> Iterator[DistillError]:
    """What a teacher in a folder here says of the split; `geometry` was judged with the config."""
    path = Path(config.teacher.path) / "config.json"
    if config.teacher.url is not None or config.teacher.geometry is not None or not path.is_file():
        return
    try:
        sizes = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return  # reported with the checkpoint
    for loc, problem in _cuts(config, sizes) if isinstance(sizes, dict) else ():
        name = ".".join(loc)
        yield ConfigError(f"{name} is {getattr(config.teacher, loc[1])}; {problem} of {path}", remedy=f"Change {name}.")


def _folder_error(name: str, folder: Path) -> DistillError | None:
    try:
        check_checkpoint(folder)
    except (ModelError, OSError) as error:
        return ModelError(f"{name} is {folder}, which cannot be loaded: {error}")
    if not (folder / "tokenizer.json").is_file():
        return ModelError(
            f"{name} is {folder}, which has no tokenizer.json", remedy="Copy the whole checkpoint folder."
        )
    return None


def is_hub_id(path: str) -> bool:
    """Whether a path that is no folder can name a model on the Hub: org/model."""
    parts = path.split("/")
    return len(parts) == 2 and all(parts) and parts[0] not in (".", "..", "~")


def _hub_home(environment: Mapping[str, str]) -> Path:
    cache = environment.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(environment.get("HF_HOME") or Path(cache) / "huggingface")


def _is_cached(hub_id: str, environment: Mapping[str, str]) -> bool:
    hub = Path(environment.get("HF_HUB_CACHE") or _hub_home(environment) / "hub")
    return (hub / f"models--{hub_id.replace('/', '--')}" / "snapshots").is_dir()


def _token_errors(config: Config, environment: Mapping[str, str]) -> Iterator[DistillError]:
    if config.tracking.wandb == "online" and not environment.get("WANDB_API_KEY") and not _has_wandb_login(environment):
        remedy = "Set WANDB_API_KEY, or use --set tracking.wandb=offline and sync later."
        yield ServiceError("tracking.wandb is online but WANDB_API_KEY is not set", remedy=remedy)
    stored = Path(environment.get("HF_TOKEN_PATH") or _hub_home(environment) / "token")
    if config.publish.repo and not environment.get("HF_TOKEN") and not stored.is_file():
        remedy = "Set HF_TOKEN, run `hf auth login`, or use --set publish.repo=null to write the folder only."
        yield ServiceError(
            f"publish.repo is {config.publish.repo} but HF_TOKEN is not set and no login is stored", remedy=remedy
        )
    variable = config.teacher.token_env
    if variable and not environment.get(variable):
        yield ServiceError(
            f"teacher.token_env is {variable} but that variable is not set",
            remedy=f"Set {variable} to the service's token.",
        )


def _has_wandb_login(environment: Mapping[str, str]) -> bool:
    path = Path(environment.get("NETRC") or Path.home() / ".netrc")
    try:
        return netrc.netrc(path).authenticators("api.wandb.ai") is not None
    except (OSError, netrc.NetrcParseError):
        return False


def is_loopback(url: str) -> bool:
    """Whether a URL points at this machine; one that cannot be read does not."""
    host = ""
    try:
        host = urlsplit(url).hostname or ""
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")
