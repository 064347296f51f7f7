"""Kept traces, and the teacher's distributions on them, as micro-batches for a student.

A trace of prompt P and completion C is fed as P + C without its last token; the token at position i predicts the one
at i + 1, so the completion's tokens, the stop token included, are predicted at len(P) - 1 .. len(P) + len(C) - 2. Only
these bear loss. Several traces lie one behind the other in one sequence; attention and positions start afresh at each.

Shape legend: N input tokens of a micro-batch, M of them trained.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from distill.dist import Ranks
from distill.errors import DataError
from distill.logit_cache import CacheReader, to_sparse_targets
from distill.losses.buckets import BucketedTargets
from distill.losses.reduce import IGNORE_INDEX
from distill.losses.sparse import SparseTargets
from distill.records import CaptureSpec, Prompt, SamplingParams, TokenDists
from distill.sampling_law import check_law, sampling_law
from distill.store import StageFolder
from distill.tokens import fingerprint
from students.aligned import AlignedSignal
from students.stored import TokenStore, TraceReader


@dataclass(frozen=True)
class Example:
    """One trace in the student's tokens, or a window of one that is too long for a row.

    shard: the name of the shard that it came from, without suffix. sampled_ids: the completion in the teacher's tokens,
    the same ones where the tokenizer is the same. window: (first, stop) of its input tokens, None for all of them.
    """

    key: str
    prompt_ids: Sequence[int]
    completion_ids: Sequence[int]
    shard: str
    sampled_ids: Sequence[int]
    window: tuple[int, int] | None = None

    @property
    def whole_tokens(self) -> int:
        """Input tokens of the whole trace."""
        return len(self.prompt_ids) + len(self.completion_ids) - 1

    @property
    def span(self) -> tuple[int, int]:
        return self.window or (0, self.whole_tokens)

    @property
    def input_tokens(self) -> int:
        return self.span[1] - self.span[0]

    @property
    def input_ids(self) -> list[int]:
        first, stop = self.span
        return (self.prompt_ids + self.completion_ids)[first:stop]

    @property
    def trained(self) -> range:
        """Which of the completion's tokens it is trained on: those that its input tokens predict."""
        first, stop = self.span
        before = len(self.prompt_ids) - 1
        return range(max(first - before, 0), max(stop - before, 0))

    @property
    def labels(self) -> list[int]:
        return self.completion_ids[self.trained.start : self.trained.stop]

    def windows(self, tokens: int) -> list["Example"]:
        """Itself in windows of at most so many input tokens, without those that train nothing. Every token of the
        completion is predicted in exactly one of them."""
        whole = self.whole_tokens
        parts = [replace(self, window=(i, min(i + tokens, whole))) for i in range(0, whole, tokens)]
        return [part for part in parts if part.trained]


@dataclass(frozen=True)
class Batch:
    """One micro-batch: a single sequence of N tokens, M of which are trained.

    input_ids_N, position_ids_N: int64. seq_lens: tokens of each trace. trained_M: int64 positions in the sequence whose
    hidden state predicts labels_M. targets: what the teacher would have said at these positions, or None. keys: the
    traces, in order. In a mixture (mixture.py) also set_M: int64, the set of each, weight_M: what its loss
    counts for, and alpha_M: the weight of its divergence in that, which stays on the CPU.
    """

    input_ids_N: torch.Tensor
    position_ids_N: torch.Tensor
    seq_lens: list[int]
    trained_M: torch.Tensor
    labels_M: torch.Tensor
    targets: SparseTargets | BucketedTargets | None
    keys: list[str]
    set_M: torch.Tensor | None = None
    alpha_M: torch.Tensor | None = None
    weight_M: torch.Tensor | None = None

    def to(self, device: torch.device) -> "Batch":
        names = ("input_ids_N", "position_ids_N", "trained_M", "labels_M", "set_M", "weight_M")
        given = {name: value for name in names if (value := getattr(self, name)) is not None}
        moved = {name: value.to(device, non_blocking=True) for name, value in given.items()}
        return replace(self, **moved, targets=self.targets and self.targets.to(device))


class TraceData:
    """The examples of one student, in the order of the trace set; `counts` says what was read, dropped, retokenised.

    aligned: how the cached distributions reach a student with another tokenizer, None for one with the teacher's.
    law: how the tokens were drawn, where that law is what is learned; None where the teacher's distributions are.
    drawn: whether the teacher drew the tokens; else it only read them (texts.py), and no token is learned as a sample.
    """

    def __init__(
        self,
        examples: list[Example],
        caches: dict[str, CacheReader] | None,
        counts: Counter,
        aligned: AlignedSignal | None = None,
        law: SamplingParams | None = None,
        drawn: bool = True,
    ):
        self.examples, self.caches, self.counts, self.aligned = examples, caches, counts, aligned
        self.law, self.drawn = law, drawn

    @property
    def keys(self) -> list[str]:
        """The name of each example in the order of the data: its trace's key, with the start of a later window."""
        return [e.key if e.span[0] == 0 else f"{e.key}+{e.span[0]}" for e in self.examples]

    @property
    def lengths(self) -> list[int]:
        """Input tokens of each example."""
        return [example.input_tokens for example in self.examples]

    @property
    def trained(self) -> list[int]:
        """Tokens of each example that bear loss."""
        return [len(example.trained) for example in self.examples]

    def collate(self, rows: list[list[int]], vocab_rows: int) -> Batch:
        """The micro-batch of these rows of indices. Without rows: one token that bears no loss, for a rank whose share
        of the step is used up but which must take part in the others' communication.

        Errors: DataError when a teacher distribution is damaged, is of another text, or names a token >= vocab_rows.
        """
        members = [self.examples[i] for row in rows for i in row]
        if not members:
            return self._empty()
        return assemble(members, self.targets(members, vocab_rows))

    def _empty(self) -> Batch:
        zero = torch.zeros(1, dtype=torch.int64)
        targets, certain = None, torch.zeros(1, 1)
        if self.caches is not None:
            targets = SparseTargets(zero[None], certain, certain[0])
        if self.aligned is not None:
            targets = BucketedTargets(zero[None], zero[None], certain, certain[0])
        first = torch.tensor(self.examples[0].prompt_ids[:1])
        return Batch(first, zero, [1], zero, torch.full((1,), IGNORE_INDEX), targets, [])

    def targets(self, members: list[Example], vocab_rows: int) -> SparseTargets | BucketedTargets | None:
        """What the teacher would have said at every trained position of these examples; None without distributions."""
        if self.caches is None:
            return None
        dists = [self._dists(example) for example in members]
        completions, sampled = [e.completion_ids for e in members], [e.sampled_ids for e in members]
        if self.aligned is None:
            targets = SparseTargets(*map(torch.from_numpy, to_sparse_targets(dists)))
        elif self.drawn:
            header = self.caches[members[0].shard].header
            capture = CaptureSpec(header.k_max, header.tail_bound, header.tail_draws)
            targets = self.aligned.targets(completions, sampled, dists, capture)
        else:
            targets = self.aligned.read_targets(completions, sampled, dists)
        try:
            targets.check(vocab_rows, distinct=False)
        except DataError as error:
            shards = sorted({example.shard for example in members})
            raise DataError(
                f"a teacher distribution cannot be used: {error.what}",
                where=f"3-logits, one of the shards {', '.join(shards)}",
                remedy="Sample the traces again: --restart traces.",
            ) from error
        if all(e.window is None for e in members):
            return targets
        rows = _trained_rows(members)
        whole = isinstance(targets, BucketedTargets) and targets.chunk_N is not None
        return (without_cut_chunks(targets, rows) if whole else targets).rows(rows)

    def _dists(self, example: Example) -> TokenDists:
        reader = self.caches[example.shard]
        dists = reader[example.key]
        if len(dists) != len(example.sampled_ids) or not np.array_equal(dists.sampled_T, example.sampled_ids):
            raise DataError(
                f"the teacher's distributions of trace {example.key} are of another text than the trace",
                where=f"3-logits/{example.shard}.cache",
                value=f"{len(dists)} positions for {len(example.sampled_ids)} tokens",
                remedy=f"Delete {example.shard} from 2-traces and 3-logits and run again: it is sampled again.",
            )
        return dists if self.law is None else sampling_law(dists, self.law, self.drawn)


def without_cut_chunks(targets: BucketedTargets, rows: torch.Tensor) -> BucketedTargets:
    """Without the chunks of which a token lies outside `rows`: nobody sees how likely the whole is."""
    outside = torch.ones(len(targets.chunk_N), dtype=torch.bool)
    outside[rows] = False
    cut = torch.isin(targets.chunk_N, targets.chunk_N[outside])
    return replace(targets, chunk_N=targets.chunk_N.masked_fill(cut, -1))


def assemble(members: list[Example], targets: SparseTargets | BucketedTargets | None) -> Batch:
    """The micro-batch of these examples, one behind the other, with the targets of their trained positions."""
    inputs, labels = [e.input_ids for e in members], [e.labels for e in members]
    seq_lens = [len(ids) for ids in inputs]
    ends = np.cumsum(seq_lens)
    trained = [end - len(part) + np.arange(len(part)) for end, part in zip(ends, labels)]  # the last ones of each
    return Batch(
        input_ids_N=torch.tensor([i for ids in inputs for i in ids]),
        position_ids_N=torch.cat([torch.arange(length) for length in seq_lens]),
        seq_lens=seq_lens,
        trained_M=torch.from_numpy(np.concatenate(trained)),
        labels_M=torch.tensor([i for part in labels for i in part]),
        targets=targets,
        keys=[e.key for e in members],
    )


def _trained_rows(members: list[Example]) -> torch.Tensor:
    """Where the trained tokens lie among the tokens of all the members' whole completions."""
    starts = np.cumsum([0, *(len(e.completion_ids) for e in members)])
    return torch.from_numpy(np.concatenate([start + np.array(e.trained) for start, e in zip(starts, members)]))


def load_traces(
    traces: StageFolder,
    logits: StageFolder | None,
    tokenizer: PreTrainedTokenizerFast,
    max_seq_tokens: int,
    teacher_path: str | None = None,
    *,
    too_long: str = "drop",
    target: str = "teacher",
    leave_out: Callable[[Prompt], bool] | None = None,
    keep_in: Path | None = None,
    made_with: str = "",
    ranks: Ranks | None = None,
) -> TraceData:
    """The kept traces of a stage in the student's tokens; with `logits`, each with its teacher distributions.

    Traces longer than max_seq_tokens are counted (too_long) and dropped, or split into windows (`fit`). Traces in
    another tokenizer's ids are tokenised again and counted (retokenised): from their text, without those whose text
    stands for no bytes (not_utf8), or, with `logits` and teacher_path, from the bytes of the teacher's ids, so that
    what is known of every position can be told (counts positions_KIND). leave_out: says of which prompts no trace is
    taken; they are counted (overlapping). keep_in: the folder that tokens are kept in from launch to launch; all
    `ranks` then call this, and share the work. made_with: what leave_out hangs on.
    Errors: DataError when nothing is left, a trace has no distributions, or a tokenizer does not fit.
    """
    own, theirs = fingerprint(tokenizer), _fingerprint_of(traces)
    aligned = None
    if logits is not None and own != theirs:
        if teacher_path is None:
            raise _other_tokenizer(traces.path, theirs, own)
        aligned = AlignedSignal(teacher_path, tokenizer, theirs)
    reader = TraceReader(traces, tokenizer if own != theirs else None, aligned, leave_out)
    store = keep_in and TokenStore(keep_in, f"{own}/{theirs}/{'text' if aligned is None else 'bytes'}/{made_with}")
    examples, counts = [], Counter(traces=0, kept=0, retokenised=0, too_long=0)
    for shard, found in reader.shards(store, ranks):
        counts.update(found.counts)
        if aligned is not None:
            aligned.add(found.learned)
        columns = zip(found.keys, found.prompts, found.completions, found.sampled)
        of_shard = [Example(key, prompt, own_ids, shard, sampled) for key, prompt, own_ids, sampled in columns]
        examples += fit(of_shard, max_seq_tokens, too_long, counts)
    if not examples:
        raise DataError(
            f"no trace is left to train on: {counts['kept']} of {counts['traces']} were kept, "
            f"{counts['too_long']} of them are longer than {max_seq_tokens} tokens",
            where=str(traces.path),
            remedy="Raise train.max_seq_tokens, set train.too_long: split, or sample more traces.",
        )
    caches = None if logits is None else _open_caches(logits, examples, theirs)
    law = _drawn_with(traces) if caches is not None and target == "sampling" else None
    data = TraceData(examples, caches, counts, aligned, law)
    counts.update(trained_tokens=sum(data.trained), input_tokens=sum(data.lengths))
    if aligned is not None:
        counts.update(aligned.finish())
    return data


def fit(examples: list[Example], max_seq_tokens: int, too_long: str, counts: Counter) -> list[Example]:
    """The examples that fit a row; the others are counted, and left out ("drop") or cut into windows ("split")."""
    fitting = []
    for example in examples:
        if example.whole_tokens <= max_seq_tokens:
            fitting.append(example)
            continue
        counts["too_long"] += 1
        if too_long == "split":
            fitting += example.windows(max_seq_tokens)
    return fitting


def _drawn_with(traces: StageFolder) -> SamplingParams:
    try:
        sampling = traces.manifest["spec"]["teacher"]["sampling"]
    except KeyError:
        raise DataError(
            "the manifest does not say how the traces were drawn, which is what the loss learns",
            where=f"{traces.path}/manifest.json",
            remedy="Sample the traces again: --restart traces, or set students.N.loss.target: teacher.",
        ) from None
    params = SamplingParams(**{name: value for name, value in sampling.items() if name != "n"})
    check_law(params)
    return params


def _fingerprint_of(traces: StageFolder) -> str:
    try:
        return traces.manifest["fingerprints"]["tokenizer"]
    except KeyError:
        raise DataError(
            "the manifest does not say which tokenizer the traces were sampled with",
            where=f"{traces.path}/manifest.json",
            remedy="Sample the traces again: --restart traces.",
        ) from None


def _open_caches(logits: StageFolder, examples: list[Example], theirs: str) -> dict[str, CacheReader]:
    caches = {}
    for shard in sorted({example.shard for example in examples}):
        path = logits.path / f"{shard}.cache"
        if not logits.has_shard(path.name):
            raise _no_distributions(path, f"the shard {path.name}")
        caches[shard] = reader = CacheReader(path)
        reader.require(sampled=True)
        if reader.header.tokenizer_fingerprint != theirs:
            raise _other_tokenizer(path, reader.header.tokenizer_fingerprint, theirs)
    for example in examples:
        if example.key not in caches[example.shard]:
            raise _no_distributions(logits.path / f"{example.shard}.cache", f"trace {example.key}")
    return caches


def _no_distributions(path: Path, what: str) -> DataError:
    shard = path.name.removesuffix(".cache")
    return DataError(
        f"{what} has no teacher distributions, and the loss is on logits",
        where=str(path),
        remedy=f"Delete {shard} from 2-traces and 3-logits and run again, or set students.N.loss.kind: response.",
    )


def _other_tokenizer(path: Path, theirs: str, own: str) -> DataError:
    return DataError(
        f"the distributions are over the tokens of tokenizer {theirs}, the student has {own}",
        where=str(path),
        remedy="Set students.N.loss.kind: response, or train a student with the teacher's tokenizer.",
    )
