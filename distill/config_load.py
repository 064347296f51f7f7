"""YAML and overrides into a checked model; every mistake told in the user's own terms, all at once.

Knows pydantic models in general and no setting in particular.
"""

import difflib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from distill.config_fields import Loc, clean_loc, field_at, settings, stand_in, tag_of, walk
from distill.errors import ConfigError

SECRET = re.compile(r"hf_[A-Za-z0-9]{16,}|\bsk-[A-Za-z0-9_-]{16,}|\bgh[pousr]_[A-Za-z0-9]{20,}|://[^/\s:@]+:[^/\s@]+@")
SECRET_KEY = re.compile(r"(token|key|secret|password)(_env)?$", re.IGNORECASE)
MOST_VALUES = 100_000
LONG_OPAQUE = re.compile(r"^[A-Za-z0-9_\-]{32,}$")


@dataclass(frozen=True)
class Problem:
    """One mistake: the settings it is about, and the sentence for the user."""

    locs: tuple[Loc, ...]
    text: str


@dataclass
class Origin:
    """Where values came from, to name the place in messages."""

    file: str
    overridden: list[Loc] = field(default_factory=list)

    def of(self, loc: Loc) -> str:
        override = any(loc[: len(each)] == each for each in self.overridden)
        return f"--set {dotted(loc)}" if override else self.file

    def name(self, loc: Loc) -> str:
        return f"{dotted(loc)} in {self.of(loc)}" if self.of(loc) == self.file else self.of(loc)


def dotted(loc: Loc) -> str:
    return ".".join(str(part) for part in loc)


def load(
    model: type[BaseModel], path: str, overrides: Sequence[str], cross_check: Callable[[Any, Origin], list[Problem]]
) -> Any:
    """The validated model; ConfigError with every problem otherwise.

    `cross_check` sees a model whose fields are valid, and returns where they contradict one another.
    """
    origin = Origin(path)
    data, problems = read_yaml(path)
    for text in overrides:
        problems += apply_override(data, text, origin)
    problems += find_secrets(data, origin)
    config, errors = validate(model, data)
    problems += [Problem((clean_loc(model, e["loc"]),), explain(model, e, origin)) for e in errors]
    if config is None:
        # Judge the rest as if the wrong values had been left out, so that nothing waits for a second attempt.
        config, _ = validate(model, repair(model, data, errors))
    if config is not None:
        seen = [loc for problem in problems for loc in problem.locs]
        problems += [p for p in cross_check(config, origin) if not any(overlap(a, b) for a in p.locs for b in seen)]
    if problems:
        raise ConfigError(summary(path, list(dict.fromkeys(p.text for p in problems))))
    return config


def summary(place: str, lines: list[str]) -> str:
    """The line itself, or a heading and the lines below it."""
    return lines[0] if len(lines) == 1 else "\n  ".join([f"{len(lines)} errors in {place}:", *lines])


def overlap(a: Loc, b: Loc) -> bool:
    short = min(len(a), len(b))
    return a[:short] == b[:short]


# --- YAML ----------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """YAML 1.2 scalars (1e-5 is a number; yes, no, on, off, 1:30 and 010 are words: what they count in YAML 1.1, as
    truth, in sixties or in eights, nobody means), with repeated keys kept as problems."""

    def __init__(self, text: str):
        super().__init__(text)
        self.repeated: list[tuple[str, int, int]] = []

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        first: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if isinstance(key, yaml.ScalarNode) and key.value != "<<":
                if key.value in first:
                    self.repeated.append((key.value, line, first[key.value]))
                first[key.value] = line
        return super().construct_mapping(node, deep)


_REPLACED = {f"tag:yaml.org,2002:{kind}" for kind in ("float", "int", "bool", "timestamp")}
_Loader.yaml_implicit_resolvers = {
    letter: [(tag, pattern) for tag, pattern in pairs if tag not in _REPLACED]
    for letter, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_FLOAT = re.compile(
    r"^[-+]?(?:(?:\d[\d_]*\.\d*|\.\d+)(?:[eE][-+]?\d+)?|\d[\d_]*[eE][-+]?\d+|\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
)
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))
_INT = re.compile(r"^[-+]?(?:0|[1-9][0-9_]*|0x[0-9a-fA-F]+)$")
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", _INT, list("-+0123456789"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)


def parse_yaml(text: str) -> tuple[Any, list[tuple[str, int, int]]]:
    """The value and the repeated keys as (key, line, line of the first); yaml.YAMLError if it cannot be parsed, or if
    aliases repeat its parts beyond MOST_VALUES, as one that stands inside itself does."""
    loader = _Loader(text)
    try:
        data = loader.get_single_data()
    finally:
        loader.dispose()
    values, waiting = 0, [data]
    while waiting:
        here = waiting.pop()
        waiting += here.values() if isinstance(here, dict) else here if isinstance(here, list) else ()
        values += 1
        if values > MOST_VALUES:
            raise yaml.MarkedYAMLError(problem=f"with what its aliases repeat it holds over {MOST_VALUES:,} values")
    return data, loader.repeated


def read_yaml(path: str) -> tuple[dict, list[Problem]]:
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        near = sorted(str(p) for p in Path(path).parent.glob("*.y*ml")) if Path(path).parent.is_dir() else []
        hint = f"There are {', '.join(near)}." if near else "Check the path."
        raise ConfigError("there is no such config file", where=path, remedy=hint) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"the config cannot be read: {error}", where=path, remedy="It must be a UTF-8 text file."
        ) from None
    try:
        data, repeated = parse_yaml(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        where, problem = _yaml_trouble(path, error)
        raise ConfigError(problem, where=where, remedy="Correct the YAML there.") from None
    if data is None:
        raise ConfigError("the config is empty", where=path, remedy="Start from a file in configs/.")
    if not isinstance(data, dict):
        remedy = "Start from a file in configs/: sections such as run: and teacher: at the top."
        raise ConfigError(f"the config must be a mapping, not a {kind_of(data)}", where=path, remedy=remedy)
    text_of = "{} stands twice in {}: in lines {} and {}. Remove one."
    return data, [Problem((), text_of.format(key, path, first, line)) for key, line, first in repeated]


def _yaml_trouble(path: str, error: Exception) -> tuple[str, str]:
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    where = f"{path}, line {mark.line + 1}, column {mark.column + 1}" if mark else path
    return where, f"not valid YAML: {problem or type(error).__name__}"


def apply_override(data: dict, text: str, origin: Origin) -> list[Problem]:
    """Puts the value of `a.b=c` into data; returns what is wrong with it."""
    path, equals, value_text = text.partition("=")
    shown = f"--set {path if SECRET.search(text) else text}"
    loc = tuple(int(part) if part.isdigit() else part for part in path.strip().split("."))
    if not equals or "" in loc:
        return [Problem((), f"{shown} is not of the form section.setting=value. Use --set train.lr=1e-5.")]
    try:
        value, _ = parse_yaml(value_text)
    except (yaml.YAMLError, ValueError, RecursionError):
        return [Problem((loc,), f"{shown}: the value is not valid YAML. Quote it.")]
    here: Any = data
    for i, part in enumerate(loc):
        last = i + 1 == len(loc)
        if isinstance(here, list) and isinstance(part, int) and part < len(here):
            pass
        elif isinstance(here, dict):
            if not last and here.get(part) is None:
                here[part] = {}
                origin.overridden.append(loc[: i + 1])
        else:
            owner = dotted(loc[:i])
            size = f"has {len(here)} items, numbered from 0" if isinstance(here, list) else f"is a {kind_of(here)}"
            return [Problem((loc,), f"{shown}: {owner} {size}, so there is no {dotted(loc[: i + 1])}.")]
        if last:
            here[part] = value
        else:
            here = here[part]
    origin.overridden.append(loc)
    return []


# --- Secrets -------------------------------------------------------------------------


def find_secrets(data: Any, origin: Origin, loc: Loc = ()) -> list[Problem]:
    """Problems for values that look like a token or password; the value itself is never repeated."""
    if isinstance(data, dict | list):
        items = data.items() if isinstance(data, dict) else enumerate(data)
        return [p for key, value in items for p in find_secrets(value, origin, (*loc, key))]
    if not is_secret(loc[-1] if loc else "", data):
        return []
    remedy = (
        "Remove it, revoke it, and put the new one in the environment: HF_TOKEN for the Hub, WANDB_API_KEY for W&B, "
    )
    remedy += "and for a teacher service the variable that teacher.token_env names."
    return [Problem((loc,), f"{origin.name(loc)} holds what looks like a secret. {remedy}")]


def is_secret(key: str | int, value: object) -> bool:
    if not isinstance(value, str):
        return False
    return bool(SECRET.search(value) or (SECRET_KEY.search(str(key)) and LONG_OPAQUE.match(value)))


def shown(loc: Loc, value: object) -> str:
    """The value as a message may print it."""
    if is_secret(loc[-1] if loc else "", value):
        return "***"
    if isinstance(value, dict | list):
        return f"a {kind_of(value)}"
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def kind_of(value: object) -> str:
    names = {dict: "mapping", list: "list", str: "string", bool: "boolean", int: "whole number", float: "number"}
    return "null" if value is None else names.get(type(value), type(value).__name__)


# --- Validation ----------------------------------------------------------------------


def validate(model: type[BaseModel], data: Any) -> tuple[Any, list[dict]]:
    try:
        return model.model_validate(data), []
    except ValidationError as error:
        return None, error.errors(include_url=False)


def repair(model: type[BaseModel], data: dict, errors: list[dict]) -> Any:
    """A copy of data without the wrong values; a setting without a default gets a stand-in that is only valid."""
    wrong: dict[Loc, Any] = {}
    for error in errors:
        info = field_at(model, error["loc"])
        required = info is not None and info.is_required() and error["type"] != "extra_forbidden"
        wrong[clean_loc(model, error["loc"])] = stand_in(info.annotation) if info is not None and required else _GONE
    return _replace(data, wrong)


_GONE = object()


def _replace(data: Any, wrong: dict[Loc, Any]) -> Any:
    def below(key: str | int) -> dict[Loc, Any]:
        return {loc[1:]: value for loc, value in wrong.items() if len(loc) > 1 and loc[0] == key}

    if isinstance(data, dict):
        added = {loc[0]: value for loc, value in wrong.items() if len(loc) == 1}
        kept = {key: _replace(value, below(key)) for key, value in data.items()}
        return {key: value for key, value in (kept | added).items() if value is not _GONE}
    if isinstance(data, list):
        kept = [wrong.get((i,), _replace(value, below(i))) for i, value in enumerate(data)]
        return [value for value in kept if value is not _GONE]
    return data


def explain(model: type[BaseModel], error: dict, origin: Origin) -> str:
    loc, kind, ctx, value = clean_loc(model, error["loc"]), error["type"], error.get("ctx", {}), error.get("input")
    if kind in ("extra_forbidden", "invalid_key"):
        return f"{origin.name(loc)} is not a setting. {suggest(model, error['loc'])}"
    if kind == "missing":
        return f"{dotted(loc)} is missing from {origin.file}. {_use(model, error['loc']) or 'Add it.'}"
    if kind == "value_error":
        return f"{origin.name(loc)}: {str(error['msg']).removeprefix('Value error, ')}."
    if kind == "union_tag_not_found":
        return f"{dotted((*loc, 'kind'))} is missing from {origin.file}. Use one of {_kinds(model, error['loc'])}."
    if kind == "union_tag_invalid":
        near = difflib.get_close_matches(str(ctx["tag"]), ctx["expected_tags"].replace("'", "").split(", "), 1)
        hint = f"Did you mean {near[0]}?" if near else "Choose one of them."
        return f"{origin.name((*loc, 'kind'))} is {ctx['tag']!r}; it must be one of {ctx['expected_tags']}. {hint}"
    if error["loc"][-1:] == ("[key]",):
        near = difflib.get_close_matches(str(value), names := re.findall(r"'([^']*)'", ctx.get("expected", "")), 1)
        hint = f"Did you mean {near[0]}?" if near else f"Use one of {', '.join(names)}."
        return f"{origin.name(loc)} is not known. {hint}"
    text = f"{origin.name(loc)} is {shown(loc, value)}; it must be {_must(kind, ctx, error['msg'])}."
    hint = _use(model, error["loc"])
    if kind == "literal_error" and isinstance(value, str):
        near = difflib.get_close_matches(value, re.findall(r"'([^']*)'", ctx["expected"]), 1)
        hint = f"Did you mean {near[0]}?" if near and not hint.startswith("Use ") else hint
    return f"{text} {hint}".rstrip()


def _must(kind: str, ctx: dict, message: str) -> str:
    bounds = {"greater_than": ("gt", ">"), "greater_than_equal": ("ge", ">="), "less_than": ("lt", "<")}
    bounds["less_than_equal"] = ("le", "<=")
    if kind in bounds:
        return f"{bounds[kind][1]} {ctx[bounds[kind][0]]:g}"
    if kind == "literal_error":
        return f"one of {ctx['expected'].replace(' or ', ', ')}"
    if kind == "string_pattern_mismatch":
        return f"text that matches {ctx['pattern']}"
    if kind in ("too_short", "too_long", "string_too_short"):
        amount, unit = ctx.get("min_length", ctx.get("max_length")), "characters" if "string" in kind else "items"
        return f"{'at most' if kind == 'too_long' else 'at least'} {amount} {unit} long"
    types_ = {"int": "a whole number", "float": "a number", "bool": "true or false", "string": "text", "list": "a list"}
    types_ |= {"dict": "a mapping", "model": "a mapping of settings", "finite": "a finite number"}
    return types_.get(kind.split("_")[0], message)


def _use(model: type[BaseModel], loc: Loc) -> str:
    info = field_at(model, loc)
    if info is None:
        return ""
    extra = info.json_schema_extra if isinstance(info.json_schema_extra, dict) else {}
    if extra.get("use"):
        return str(extra["use"])
    if info.is_required() or isinstance(info.default, BaseModel):
        return f"Meaning: {info.description}." if info.description else ""
    return f"The default is {shown((), info.default) if not isinstance(info.default, list) else info.default}."


def _kinds(model: type[BaseModel], loc: Loc) -> str:
    *_, (_, here, _) = walk(model, loc)
    return ", ".join(filter(None, map(tag_of, here)))


def suggest(model: type[BaseModel], loc: Loc) -> str:
    """The nearest setting of that section, else of the whole config, else the section's names."""
    *_, (_, here, _) = [(True, [model], None), *walk(model, loc[:-1])]
    names, wrong = [name for m in here for name in m.model_fields], str(loc[-1])
    near = difflib.get_close_matches(wrong, names, 1, 0.6)
    if near:
        return f"Did you mean {near[0]}?"
    paths = [path for path, _ in settings(model)]
    leaf = {path: path.rsplit(".", 1)[-1] for path in paths}
    best = difflib.get_close_matches(wrong, sorted(set(leaf.values())), 1, 0.75)
    if best:
        return f"Did you mean {' or '.join([path for path in paths if leaf[path] == best[0]][:3])}?"
    return f"The settings there are {', '.join(names)}." if names else "Remove it."
