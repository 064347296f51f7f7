"""How each model looks on the report's page: its colour, its name with what it is, and its points in a chart."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from distill.evals.svg import Point, Series


class Look:
    """Colours of a report's models: ink for the teacher, muted ones for bases, bright ones for students in turn."""

    def __init__(self, models: Sequence[dict]):
        self.by_name = {model["name"]: model for model in models}
        colours = {"teacher": ("s0",), "base": ("s1", "s8"), "student": ("s2", "s3", "s4", "s5", "s6", "s7")}
        self.style: dict[str, str] = {}
        for role, classes in colours.items():
            names = [model["name"] for model in models if model["role"] == role]
            self.style |= {name: classes[i % len(classes)] for i, name in enumerate(names)}

    def style_of(self, name: str) -> str:
        return self.style.get(name, "s7")

    def who(self, name: str) -> str:
        model = self.by_name.get(name, {})
        about = model.get("role", "") + (f", {model['loss']}" if model.get("loss") else "")
        swatch = f'<span class="{self.style_of(name)}"><span class="swatch"></span></span>'
        return f'{swatch}<span class="who">{escape(name)}</span> <span class="role under">{escape(about)}</span>'

    def short(self, name: str) -> str:
        swatch = f'<span class="{self.style_of(name)}"><span class="swatch"></span></span>'
        return f'{swatch}<span class="who">{escape(name)}</span>'

    def key(self, names: Iterable[str]) -> str:
        keys = (f'<span><i class="{self.style_of(n)}"><i class="swatch"></i></i>{escape(n)}</span>' for n in names)
        return f'<div class="key">{"".join(keys)}</div>'

    def series(self, name: str, points: Sequence[Point | None]) -> Series:
        return Series(name, self.style_of(name), points)
