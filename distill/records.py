"""What flows between the stages: prompts, samples, traces, verdicts and the teacher's sparse distributions.

No torch here: a config error or `--help` must not wait for it.
Shape legend: T tokens of one completion, S stored support entries of all its tokens together.
"""

import hashlib
import re
import unicodedata
from dataclasses import dataclass, field
from enum import StrEnum

import numpy as np

SCHEMA_VERSION = 1


class Verdict(StrEnum):
    """What the grader says of one completion."""

    CORRECT = "correct"
    WRONG = "wrong"
    TRUNCATED = "truncated"  # no end of sequence within the token budget, or no </think>
    UNPARSABLE = "unparsable"  # it ended, but holds no answer that can be read
    ERROR = "error"  # the grader failed; never counted as wrong


def prompt_key(text: str) -> str:
    """16 hex digits that identify a prompt by its content: NFC, whitespace collapsed."""
    canonical = re.sub(r"\s+", " ", unicodedata.normalize("NFC", text)).strip()
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def sample_seed(run_seed: int, key: str, sample_index: int) -> int:
    """A 63-bit seed of one sample, the same on every machine and in every batch."""
    digest = hashlib.sha256(f"{run_seed}/{key}/{sample_index}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


@dataclass(frozen=True)
class Prompt:
    """One problem. `grader` names the rule in distill.grade; `metadata` is what that rule needs (JSON values only)."""

    text: str
    answer: str
    family: str
    level: int = 0
    grader: str = "exact"
    source: str = ""
    metadata: dict = field(default_factory=dict)

    @property
    def key(self) -> str:
        return prompt_key(self.text)


@dataclass(frozen=True)
class SamplingParams:
    """How completions are drawn. temperature 0 is greedy; top_p 1, top_k 0 and min_p 0 switch the filters off.

    `stop`: texts that end a completion besides the model's stop ids; the token that completes one belongs to it.
    """

    temperature: float = 0.6
    top_p: float = 0.95
    top_k: int = 0
    max_new_tokens: int = 512
    min_p: float = 0.0
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class CaptureSpec:
    """Which part of the teacher's temperature-1 distribution is stored per token.

    tail_draws: so many draws stand for what the bounds leave out (distill.sampling.draw_tail); 0: its mass alone does.
    """

    k_max: int = 64
    tail_bound: float = 1e-3
    tail_draws: int = 0

    @property
    def min_mass(self) -> float:
        """What an entry must weigh to be worth its bytes in a cache; a lighter one counts into the tail there."""
        return 0.0 if self.tail_draws else self.tail_bound / 8


@dataclass(frozen=True)
class SampleRequest:
    """One completion to draw: everything its tokens depend on besides model and SamplingParams."""

    key: str
    sample_index: int
    prompt_ids: tuple[int, ...]
    seed: int


@dataclass
class TokenDists:
    """Sparse next-token distributions at temperature 1, before any filter, for T consecutive tokens.

    offsets_T1: int64 [T+1]; token t owns entries offsets_T1[t]:offsets_T1[t+1] of ids_S (int32, most likely first) and
    logprobs_S (float32, true log-probabilities, nats). tail_T: float32, exact probability mass outside the support.
    logsumexp_T: float32 of the raw logits. sampled_T: int32, the token that was drawn (always in the support).
    """

    offsets_T1: np.ndarray
    ids_S: np.ndarray
    logprobs_S: np.ndarray
    tail_T: np.ndarray
    logsumexp_T: np.ndarray
    sampled_T: np.ndarray

    def __len__(self) -> int:
        return len(self.tail_T)


@dataclass
class Sample:
    """One drawn completion. completion_ids ends with a stop id, or with what completed a stop text, when finish_reason
    is "stop"."""

    key: str
    sample_index: int
    seed: int
    completion_ids: list[int]
    finish_reason: str  # "stop" or "length"
    dists: TokenDists | None = None


@dataclass
class Trace:
    """One graded completion of a prompt, kept for training or dropped with a reason."""

    prompt: Prompt
    sample_index: int
    seed: int
    prompt_ids: list[int]
    completion_ids: list[int]
    text: str
    finish_reason: str
    verdict: Verdict
    keep: bool
    drop_reason: str = ""

    @property
    def sample_key(self) -> str:
        return f"{self.prompt.key}/{self.sample_index}"
