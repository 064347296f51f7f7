"""What a client may ask for: the fields of each route, their bounds, and how a body becomes rows to draw.

The fields are OpenAI's, with those of other open servers (top_k, min_p, return_token_ids) and one of our own, capture.
Every mistake of a body is told at once. What is known but not done here is an error unless it is set to the value that
changes nothing; what is not known at all is an error that names the nearest field.
"""

import hashlib
import secrets
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from distill.config_fields import clean_loc
from distill.config_load import Origin, dotted, explain, summary
from distill.records import CaptureSpec
from teachers.service_refusals import NOT_FOUND, Refused

BODY = Origin("the body")
INT64 = 2**63
MAX_STOPS, MAX_STOP_BYTES = 16, 256
ALL_OF_THEM = -1.0  # a tail bound that no tail is below, so that k_max tokens are captured however sure the model is
TOP_STEPS = (0, 1, 5, 20)  # rows that ask for about as many top log-probabilities are captured together


class Fields(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


def _known_but_unused(*neutral: object) -> Any:
    """A field that is accepted with one of these values, which change nothing."""

    def check(value: object) -> object:
        if value is None or any(value == each and type(value) is type(each) for each in neutral):
            return value
        raise ValueError(f"this service does not do that. {_or_leave_out(neutral)}")

    return Annotated[Any, BeforeValidator(check)]


def _or_leave_out(neutral: tuple[object, ...]) -> str:
    return f"Use {neutral[0]!r}, or leave it out" if neutral else "Leave it out"


class Capture(Fields):
    """The teacher's own distributions: most likely tokens until the rest weighs less than tail_bound; with tail_draws,
    so many draws stand for the rest (distill.records.CaptureSpec)."""

    k_max: int = Field(64, ge=1)
    tail_bound: float = Field(1e-3, ge=0, lt=1)
    tail_draws: int = Field(0, ge=0)


class StreamOptions(Fields):
    include_usage: bool | None = None
    include_obfuscation: _known_but_unused(False) = None


class Sampled(Fields):
    """What both completion routes take."""

    model: str | None = None
    n: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=100)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1)
    min_p: float | None = Field(None, ge=0, le=1)
    max_tokens: int | None = Field(None, ge=1)
    seed: int | None = Field(None, ge=-INT64, lt=INT64)
    stop: Any = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    capture: Capture | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    # Who asks and how it is billed: no part of the answer depends on them.
    user: Any = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None
    # Known, and not done here.
    frequency_penalty: _known_but_unused(0, 0.0) = None
    presence_penalty: _known_but_unused(0, 0.0) = None
    repetition_penalty: _known_but_unused(1, 1.0) = None
    logit_bias: _known_but_unused({}) = None
    skip_special_tokens: _known_but_unused(False) = None
    ignore_eos: _known_but_unused(False) = None


class CompletionFields(Sampled):
    prompt: Any
    logprobs: int | None = Field(None, ge=0)
    echo: _known_but_unused(False) = None
    suffix: _known_but_unused("") = None
    best_of: _known_but_unused(1) = None


class Message(Fields):
    role: str = Field(min_length=1, max_length=64)
    content: Any
    name: _known_but_unused() = None


class ChatFields(Sampled):
    messages: list[Message] = Field(min_length=1, max_length=4096)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0)
    tools: _known_but_unused([]) = None
    tool_choice: _known_but_unused("none", "auto") = None
    functions: _known_but_unused([]) = None
    function_call: _known_but_unused("none", "auto") = None
    parallel_tool_calls: _known_but_unused(False, True) = None
    response_format: _known_but_unused({"type": "text"}) = None
    modalities: _known_but_unused(["text"]) = None
    audio: _known_but_unused() = None
    prediction: _known_but_unused() = None
    reasoning_effort: _known_but_unused() = None
    verbosity: _known_but_unused() = None
    web_search_options: _known_but_unused() = None


class Sequence(Fields):
    prompt_ids: Any
    completion_ids: Any


class ScoreFields(Fields):
    model: str | None = None
    sequences: list[Sequence] = Field(min_length=1)
    capture: Capture = Capture()
    format: Literal["json", "binary"] | None = None


def parse(fields: type[BaseModel], body: bytes) -> Any:
    """The fields of a body; Refused with every mistake in it otherwise."""
    try:
        return fields.model_validate_json(body)
    except ValidationError as error:
        found = error.errors(include_url=False)
    if found[0]["type"] == "json_invalid":
        raise Refused(
            f"the body is not JSON: {found[0]['ctx']['error']}", code="invalid_json", remedy="Send a JSON object."
        )
    if not found[0]["loc"]:
        raise Refused("the body must be a JSON object", code="invalid_type", remedy='Send {"model": ..., ...}.')
    lines = list(dict.fromkeys(explain(fields, each, BODY) for each in found))
    loc = clean_loc(fields, found[0]["loc"])
    refused = Refused(summary("the body", lines), param=dotted(loc) or None, code=found[0]["type"])
    refused.args = (summary("the body", lines),)  # the lines name the place themselves
    raise refused


def check_model(asked: str | None, served: str) -> None:
    if asked is not None and asked != served:
        raise Refused(
            f"the model {asked[:80]!r} is not served here",
            status=404,
            kind=NOT_FOUND,
            code="model_not_found",
            param="model",
            remedy=f"Use {served!r}.",
        )


def limited(name: str, value: int, limit: int, setting: str) -> int:
    """The value, if it is within a limit of the service."""
    if value > limit:
        raise Refused(
            f"it must be at most {limit}",
            param=name,
            value=value,
            code="over_limit",
            remedy=f"Lower it, or raise serve.{setting}.",
        )
    return value


def stop_texts(value: object) -> tuple[str, ...]:
    texts = [value] if isinstance(value, str) else [] if value is None else value
    good = isinstance(texts, list) and len(texts) <= MAX_STOPS
    if not good or not all(isinstance(text, str) and 0 < len(text.encode()) <= MAX_STOP_BYTES for text in texts):
        raise Refused(
            f"it must be a text, or a list of at most {MAX_STOPS} texts, of 1 to {MAX_STOP_BYTES} bytes each",
            param="stop",
            code="invalid_type",
            remedy='Use "stop": ["\\n\\n"], or leave it out.',
        )
    return tuple(texts)


def token_ids(name: str, value: object, vocab_size: int, least: int = 1) -> tuple[int, ...]:
    """The value as ids of this model."""
    if not isinstance(value, list) or not all(type(each) is int for each in value):
        raise Refused(
            "it must be a list of token ids", param=name, code="invalid_type", remedy="Use whole numbers only."
        )
    if len(value) < least:
        raise Refused("it has no tokens", param=name, code="empty", remedy="Give at least one token.")
    wrong = next((i for i, each in enumerate(value) if not 0 <= each < vocab_size), None)
    if wrong is not None:
        raise Refused(
            f"this model's ids are 0 to {vocab_size - 1}",
            param=f"{name}.{wrong}",
            value=value[wrong],
            code="out_of_range",
            remedy="Encode with this model's tokenizer.",
        )
    return tuple(value)


def capture_spec(capture: Capture | None, top: int | None, limit: int) -> CaptureSpec | None:
    """What a row must capture for its answer: the asked distributions, or `top` log-probabilities and the drawn one."""
    if capture is not None and top is not None:
        raise Refused(
            "distributions and log-probabilities exclude each other",
            param="capture",
            code="contradiction",
            remedy="Leave out logprobs: what was captured holds them.",
        )
    if capture is not None:
        return CaptureSpec(
            k_max=limited("capture.k_max", capture.k_max, limit, "max_top_logprobs"),
            tail_bound=capture.tail_bound,
            tail_draws=limited("capture.tail_draws", capture.tail_draws, limit, "max_top_logprobs"),
        )
    if top is None:
        return None
    most = next((step for step in TOP_STEPS if top <= step <= limit), limit)
    return CaptureSpec(most + 1, ALL_OF_THEM)


def choice_seed(seed: int | None, index: int) -> int:
    """The seed of a choice: the first has the one that was asked for, the others are derived from it."""
    if seed is None:
        return secrets.randbits(63)
    if index == 0:
        return seed
    return int.from_bytes(hashlib.sha256(f"{seed}/{index}".encode()).digest()[:8], "little") >> 1
