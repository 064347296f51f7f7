"""The settings of a pydantic model as a user sees them: their dotted paths, types, bounds and defaults."""

import types
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

Loc = tuple[str | int, ...]


def models_of(annotation: Any) -> list[type[BaseModel]]:
    """The models that a value of this type may be: through Optional, Annotated, list and unions."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if get_origin(annotation) in (Annotated, list, Union, types.UnionType):
        return [m for arg in get_args(annotation) for m in models_of(arg)]
    return []


def tag_of(model: type[BaseModel]) -> str | None:
    kind = model.model_fields.get("kind")
    return kind.default if kind is not None and isinstance(kind.default, str) else None


def walk(model: type[BaseModel], loc: Loc) -> Iterator[tuple[bool, list[type[BaseModel]], FieldInfo | None]]:
    """For each part of loc: whether the user wrote it, the models at that point, and its field if it is one."""
    here: list[type[BaseModel]] = [model]
    info: FieldInfo | None = None
    for part in loc:
        tagged = [m for m in here if tag_of(m) == part] if len(here) > 1 else []
        if tagged:
            here = tagged
            yield False, here, info
            continue
        if isinstance(part, str):
            info = next((m.model_fields[part] for m in here if part in m.model_fields), None)
            here = models_of(info.annotation) if info is not None else []
        yield part != "[key]", here, info


def clean_loc(model: type[BaseModel], loc: Loc) -> Loc:
    """The path as the user wrote it: without pydantic's union tags."""
    return tuple(part for part, (written, _, _) in zip(loc, walk(model, loc)) if written)


def field_at(model: type[BaseModel], loc: Loc) -> FieldInfo | None:
    return next((info for _, _, info in reversed(list(walk(model, loc)))), None)


def settings(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """(dotted path, field) of every leaf setting, in order: list items are N, a union's kinds follow one another."""
    for name, info in model.model_fields.items():
        inner = models_of(info.annotation)
        many = ".N" if get_origin(info.annotation) is list else ""
        for each in inner:
            label = f"({tag_of(each)})" if len(inner) > 1 else ""
            yield from settings(each, f"{prefix}{name}{many}{label}.")
        if not inner:
            yield prefix + name, info


def stand_in(annotation: Any) -> Any:
    """Some valid value of a simple type; None for others."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return stand_in(args[0])
    return args[0] if origin is Literal else {str: "x", int: 8}.get(annotation)


def table(model: type[BaseModel]) -> str:
    """An aligned text table of the settings; a section that occurs again is one line that points at the first."""
    rows = [("setting", "type", "default", "unit", "bounds", "meaning"), *_rows(model, "", {})]
    widths = [max(len(row[i]) for row in rows if len(row[i]) <= 42) for i in range(5)]  # the few longer cells stick out
    lines = ["  ".join([*(cell.ljust(width) for cell, width in zip(row, widths)), row[5]]).rstrip() for row in rows]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


def _rows(model: type[BaseModel], prefix: str, first: dict[type, str]) -> Iterator[tuple[str, ...]]:
    for name, info in model.model_fields.items():
        for each in models_of(info.annotation):
            many = ".N" if get_origin(info.annotation) is list else ""
            path = f"{prefix}{name}{many}" + (f"({kind})" if (kind := tag_of(each)) else "")
            if each in first:
                yield path, "section", "", "", "", f"as {first[each]}"
            else:
                yield from _rows(each, path + ".", first)
            first.setdefault(each, path)
        if not models_of(info.annotation):
            yield _row(prefix + name, info)


def _row(path: str, info: FieldInfo) -> tuple[str, ...]:
    extra = info.json_schema_extra if isinstance(info.json_schema_extra, dict) else {}
    signs = (("gt", ">"), ("ge", ">="), ("lt", "<"), ("le", "<="), ("min_length", "length >="), ("pattern", "matches"))
    bounds = [
        f"{sign} {value}"
        for m in _flat(info.metadata)
        for name, sign in signs
        if (value := getattr(m, name, None)) is not None
    ]
    default = "required" if info.is_required() else "null" if info.default is None else str(info.default)
    default = default.lower() if isinstance(info.default, bool) else default
    unit = str(extra.get("unit") or "")
    return path, type_name(info.annotation), default, unit, ", ".join(bounds), info.description or ""


def _flat(metadata: Sequence[Any]) -> Iterator[Any]:
    for item in metadata:
        yield from item.metadata if isinstance(item, FieldInfo) else [item]


def type_name(annotation: Any) -> str:
    origin, args = get_origin(annotation), get_args(annotation)
    if annotation is type(None):
        return "null"
    if origin is Annotated:
        return type_name(args[0])
    if origin is Literal:
        return "|".join(str(arg) for arg in args)
    if origin in (Union, types.UnionType):
        return "|".join(type_name(arg) for arg in args)
    if origin in (list, dict):
        return f"{origin.__name__}[{', '.join(type_name(arg) for arg in args)}]"
    return getattr(annotation, "__name__", str(annotation))
