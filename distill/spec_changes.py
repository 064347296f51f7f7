"""What differs between two nested settings, in words: why a stage is of another config."""

import json
from typing import Any

_ABSENT = object()


def changes(found: dict, wanted: dict) -> list[str]:
    """'KEY is VALUE there, VALUE now' for every leaf that differs, in the order of the dotted keys."""
    there, here = _flatten(found), _flatten(wanted)
    differing = [key for key in sorted(there | here) if there.get(key, _ABSENT) != here.get(key, _ABSENT)]
    return [f"{key.removeprefix('spec.')} is {_show(there, key)} there, {_show(here, key)} now" for key in differing]


def _show(flat: dict[str, Any], key: str) -> str:
    return json.dumps(flat[key], ensure_ascii=False) if key in flat else "absent"


def _flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted key -> leaf. A list of objects is entered by index; other lists and empty containers are leaves."""
    if isinstance(value, dict) and value:
        items = [(f"{prefix}.{key}" if prefix else key, child) for key, child in value.items()]
    elif isinstance(value, list) and any(isinstance(child, dict | list) for child in value):
        items = [(f"{prefix}[{index}]", child) for index, child in enumerate(value)]
    else:
        return {prefix: value}
    return {key: leaf for name, child in items for key, leaf in _flatten(child, name).items()}
