"""What the sections of a config are made of: types of fields, and the class that forbids unknown names."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator

NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
ENV_NAME = r"^[A-Za-z_][A-Za-z0-9_]*$"


def _whole(value: object) -> object:
    """1e5 is a whole number too, though YAML reads it as a float. What 64 bits cannot hold, nothing later can."""
    whole = int(value) if isinstance(value, float) and value.is_integer() else value
    if isinstance(whole, int) and not -(2**63) <= whole < 2**63:
        raise ValueError("the number is too large for 64 bits. Use a smaller one")
    return whole


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
