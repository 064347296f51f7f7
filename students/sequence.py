"""One row over several ranks (DeepSpeed Ulysses): each rank has a run of its tokens, and in attention a share of the
heads over all of its tokens.

Outside attention a layer treats every token by itself, so a rank needs no token but its own. Around attention two
all-to-alls change who holds what: tokens of all heads -> all tokens of some heads, and back. Packing boundaries, masks
and the longest trace stay those of the whole row. The loss of a rank is that of its own trained tokens over the GLOBAL
number of trained tokens, so losses and gradients add up over the ranks as they do without this. The likelihood of a
chunk of text, whose tokens may lie on several ranks, is added up over them first (losses/chunks.py).

Shape legend: N tokens of a row, P ranks that share it, L = N / P tokens of a rank, A query heads, G key-value heads,
D head width, M trained positions, C chunks of text of which this rank has tokens. Suffix p: divided by P.
"""

from dataclasses import dataclass, fields, replace

import torch
import torch.nn.functional as F
from transformers import PretrainedConfig

from distill.dist import Ranks
from distill.errors import ConfigError
from distill.losses.buckets import BucketedTargets
from distill.losses.sparse import SparseTargets
from students.data import Batch


@dataclass(frozen=True)
class RowRanks:
    """The `size` ranks that work on the same rows; this one is number `place` of them. `group` names them to the
    all-to-all."""

    size: int
    place: int
    group: str

    def heads(
        self, query_1ALD: torch.Tensor, key_1GLD: torch.Tensor, value_1GLD: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """([1, A/P, N, D], and twice [1, max(G/P, 1), N, D]): all tokens of this rank's heads.

        Where P does not divide G, key-value heads are repeated until it does: a query head goes to the same rank as
        the key-value head that serves it.
        """
        copies = key_copies(query_1ALD.shape[1], key_1GLD.shape[1], self.size)
        if copies > 1:
            key_1GLD, value_1GLD = (x.repeat_interleave(copies, 1) for x in (key_1GLD, value_1GLD))
        parts = [self._by_rank(x) for x in (query_1ALD, key_1GLD, value_1GLD)]
        sent_PLHD = torch.cat(parts, 2)
        received_NHD = self._exchange(sent_PLHD).flatten(0, 1)
        found = received_NHD.split([part.shape[2] for part in parts], 1)
        return tuple(x.transpose(0, 1)[None] for x in found)

    def tokens(self, out_1NApD: torch.Tensor) -> torch.Tensor:
        """[1, L, A, D]: all heads of this rank's tokens."""
        received_PLApD = self._exchange(out_1NApD[0].unflatten(0, (self.size, -1)))
        return received_PLApD.transpose(0, 1).flatten(1, 2)[None]

    def share(self, batch: Batch) -> Batch:
        """This rank's part of a micro-batch: its tokens, and the trained positions, labels and targets among them.

        seq_lens stays that of the whole row. A row that P does not divide is filled up by one more trace, of fewer
        than P tokens, that bears no loss and that no other sees.
        """
        tokens = len(batch.input_ids_N)
        filling = -tokens % self.size
        each = (tokens + filling) // self.size
        first = self.place * each
        mine_m = ((batch.trained_M >= first) & (batch.trained_M < first + each)).nonzero().flatten()
        given = {field.name: getattr(batch, field.name) for field in fields(batch)}
        tensors = {name: value for name, value in given.items() if isinstance(value, torch.Tensor)}
        changed = {n: F.pad(x, (0, filling))[first : first + each] for n, x in tensors.items() if n.endswith("_N")}
        changed |= {n: x[mine_m] for n, x in tensors.items() if n.endswith("_M")}
        changed["trained_M"] = changed["trained_M"] - first
        changed["seq_lens"] = batch.seq_lens + [filling] * (filling > 0)
        return replace(batch, **changed, targets=batch.targets and _numbered(batch.targets).rows(mine_m))

    def add_up(self, names_C: torch.Tensor, values_CX: torch.Tensor, names: int) -> torch.Tensor:
        """[C, X]: the values of each name, 0 .. names - 1, added up over the ranks that have it; all ranks call it."""
        sent_KX = values_CX.new_zeros(names, values_CX.shape[1]).index_copy(0, names_C, values_CX)
        return self._exchange(sent_KX.expand(self.size, -1, -1)).sum(0)[names_C]

    def _by_rank(self, x_1HLD: torch.Tensor) -> torch.Tensor:
        """[P, L, H/P, D], a view."""
        return x_1HLD[0].transpose(0, 1).unflatten(1, (self.size, -1)).transpose(0, 1)

    def _exchange(self, x_P: torch.Tensor) -> torch.Tensor:
        """x[i] of rank j where rank i had x[j]; differentiable, and visible to torch.compile."""
        return torch.ops.deepspeed.dim_zero_all_to_all(x_P.contiguous(), self.group)


def _numbered(targets: SparseTargets | BucketedTargets) -> SparseTargets | BucketedTargets:
    """With chunks, if any, whose numbers are below the number of tokens."""
    chunk_M = getattr(targets, "chunk_N", None)
    if chunk_M is None:
        return targets
    return replace(targets, chunk_N=chunk_M.unique(return_inverse=True)[1].masked_fill(chunk_M < 0, -1))


def row_ranks(ranks: Ranks, size: int, config: PretrainedConfig) -> RowRanks | None:
    """Who shares a row with this rank: `size` neighbours. None where size is 1. All ranks call it at the same time.

    Errors: ConfigError when `size` does not divide the ranks or the student's attention heads.
    """
    if size == 1:
        return None
    heads, divisors = config.num_attention_heads, [n for n in range(1, ranks.world + 1) if ranks.world % n == 0]
    if ranks.world % size:
        raise _refused(size, f"{ranks.world} rank{'s' * (ranks.world > 1)}", divisors)
    if heads % size:
        raise _refused(size, f"the student's {heads} attention heads", [n for n in divisors if heads % n == 0])

    from deepspeed.sequence.layer import register_all_to_all_group
    from torch.distributed import new_subgroups

    group, _ = new_subgroups(group_size=size)
    register_all_to_all_group(group)
    return RowRanks(size, ranks.rank % size, group.group_name)


def key_copies(heads: int, kv_heads: int, ranks: int) -> int:
    """How often each key-value head is repeated so that `ranks`, which divides `heads`, divides their number."""
    group = heads // kv_heads
    return next(n for n in range(1, group + 1) if group % n == 0 and kv_heads * n % ranks == 0)


def _refused(size: int, by: str, fitting: list[int]) -> ConfigError:
    return ConfigError(
        f"it does not divide {by}",
        where="train.sequence_parallel",
        value=size,
        remedy=f"Use one of {', '.join(map(str, fitting))}.",
    )
