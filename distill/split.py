"""How one model is laid over ranks: who holds which part, who works on which share of the requests.

    copy 0: ranks 0..size-1, copy 1: the next ones, ...           size = max(tensor parallel, expert parallel)
    inside a copy: neighbours of a tensor-parallel group work on the same requests, each with its part of the heads and
    of the dense layers; the ranks of an expert-parallel group hold different routed experts and exchange tokens.

One of the two sizes divides the other. No torch here: configs are checked with it.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from distill.errors import ConfigError

FAMILIES = ("deepseek_v3", "qwen2", "qwen3", "llama")  # whose layers are known well enough to cut them


@dataclass(frozen=True)
class Split:
    """The place of `rank` of `world` in a model split `tensor_parallel` and `expert_parallel` ways."""

    tensor_parallel: int = 1
    expert_parallel: int = 1
    rank: int = 0
    world: int = 1

    def __post_init__(self) -> None:
        if problem := next(ways_problems(self.tensor_parallel, self.expert_parallel, self.world), None):
            raise ConfigError(
                f"the teacher cannot be split like this over {self.world} ranks: {problem}",
                where="teacher.tensor_parallel, teacher.expert_parallel",
                value=(self.tensor_parallel, self.expert_parallel),
                remedy="Change them, or start another number of ranks.",
            )

    def __str__(self) -> str:
        copies = "1 copy" if self.world == self.size else f"{self.world // self.size} copies"
        return f"tensor parallel {self.tensor_parallel}, expert parallel {self.expert_parallel}, {copies}"

    @property
    def size(self) -> int:
        """Ranks that hold one copy of the model together."""
        return max(self.tensor_parallel, self.expert_parallel)

    @property
    def block(self) -> range:
        """The ranks of this rank's copy."""
        first = self.rank - self.rank % self.size
        return range(first, first + self.size)

    @property
    def blocks(self) -> list[range]:
        """The ranks of every copy."""
        return [range(first, first + self.size) for first in range(0, self.world, self.size)]

    @property
    def tensor_rank(self) -> int:
        """Place in the tensor-parallel group. Place 0 speaks for the group: it grades and writes."""
        return self.rank % self.tensor_parallel

    @property
    def expert_rank(self) -> int:
        """Place in the expert-parallel group: which routed experts this rank holds."""
        return self.rank % self.expert_parallel

    def held_experts(self, total: int) -> range:
        """The routed experts, of so many, whose weights this rank has."""
        each = total // self.expert_parallel
        return range(self.expert_rank * each, (self.expert_rank + 1) * each)

    def answering_experts(self, total: int) -> range:
        """Those of them that it computes: ranks of a tensor-parallel group that have the same ones divide them."""
        held, twins = self.held_experts(total), max(1, self.tensor_parallel // self.expert_parallel)
        twin = self.tensor_rank // self.expert_parallel if twins > 1 else 0
        return held[len(held) * twin // twins : len(held) * (twin + 1) // twins]

    @property
    def share(self) -> int:
        """Which of `shares` parts of the requests this rank works on, with the others of its tensor-parallel group."""
        return self.rank // self.tensor_parallel

    @property
    def shares(self) -> int:
        return self.world // self.tensor_parallel

    def turns(self, missing: Sequence[str]) -> list[str | None]:
        """What of the missing shards this rank works on, in order. None: it only takes part, because ranks that hold
        one copy work together, those without a shard in the last turn too."""
        mine = missing[self.share :: self.shares]
        turns = -(-len(missing) // self.shares) if self.size > 1 else len(mine)
        return [*mine, None][:turns]


def ways_problems(tensor_parallel: int, expert_parallel: int, ranks: int) -> Iterator[str]:
    """Why `ranks` ranks cannot be split like this, whatever the model; nothing if they can."""
    larger, smaller = max(tensor_parallel, expert_parallel), min(tensor_parallel, expert_parallel)
    if larger % smaller:
        yield f"of {tensor_parallel} and {expert_parallel} one must divide the other"
    if ranks % larger:
        yield f"{larger} must divide the {ranks} ranks"


def tensor_problems(config: Mapping[str, Any], tensor_parallel: int) -> Iterator[str]:
    """Why a model with this config.json (or these sizes under its names) cannot be cut into so many parts."""
    family = config.get("model_type")
    if tensor_parallel > 1 and family not in FAMILIES:
        yield f"model_type {family} is not cut; supported are {', '.join(FAMILIES)}"
    for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size", "moe_intermediate_size"):
        if (config.get(name) or 0) % tensor_parallel:
            yield f"it must divide {name}, {config[name]}"


def expert_problems(config: Mapping[str, Any], expert_parallel: int) -> Iterator[str]:
    """Why the routed experts of a model with this config.json cannot be dealt out to so many ranks."""
    if expert_parallel == 1:
        return
    experts = config.get("n_routed_experts") if config.get("model_type") == "deepseek_v3" else None
    if not experts:
        yield f"model_type {config.get('model_type')} has no routed experts to deal out; use 1"
    elif experts % expert_parallel:
        yield f"it must divide n_routed_experts, {experts}"
