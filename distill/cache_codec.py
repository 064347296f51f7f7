"""TokenDists of one trace <-> bytes: columns of small integers (cache_planes.py) and no loop over tokens.

What makes the columns small
- log-probabilities are rounded to levels (cache_levels.py): uniform in sqrt(p), and in log(p) where p is small
- the most likely entry of a token is what the others and the tail leave of 1: its mass costs nothing. What that misses
  of its level is stored, nearly always 0; where it is not, all masses and the tail are scaled to sum to 1
- ids are ranks by frequency within the trace, whose distinct ids come first, ascending, each with the number of bits
  of its count: ids whose counts have as many bits are ranked by id
- the other entries of a token are stored by rank, as the gaps between ranks: a set, whose order costs nothing, and
  supports that share many ids share long strings of bytes. The reader sorts them by level
- the tail mass is rounded to levels too, none off by more than TAIL_BOUND; logsumexp to steps of LOGSUMEXP_STEP nats

Shape legend: T tokens, S support entries of all tokens together, U distinct ids of the trace.
"""

import struct
from dataclasses import replace

import numpy as np

from distill.cache_levels import LOGSUMEXP_STEP, TAIL_BOUND, level, logprob
from distill.cache_planes import ColumnReader, compressor, write_column
from distill.errors import DataError
from distill.records import TokenDists

_HEAD = struct.Struct("<IIi")  # support entries, distinct ids, smallest logsumexp in steps
_SMALLEST = 1e-9  # floor of the derived mass; the stored correction makes up for it
_MOST_LOGSUMEXP = 1e7  # nats; beyond it is no logit
_LEVEL_BITS = 20
_MOST_LEVEL = 0xFFFF  # of a log-probability of minus 32,000 nats


def prune(dists: TokenDists, min_mass: float) -> TokenDists:
    """The distributions without entries lighter than min_mass, whose mass goes to the tail.

    For a given number of entries this leaves the smallest mean tail: any other choice stores a lighter entry somewhere
    in the place of a heavier one. The most likely and the sampled entry stay.
    """
    starts_T, sizes_T = dists.offsets_T1[:-1], np.diff(dists.offsets_T1)
    token_S = np.repeat(np.arange(len(sizes_T)), sizes_T)
    masses_S = np.exp(dists.logprobs_S.astype(np.float64))
    keep_S = (masses_S >= min_mass) | (dists.ids_S == dists.sampled_T[token_S])
    keep_S |= dists.logprobs_S == np.maximum.reduceat(dists.logprobs_S, starts_T)[token_S]
    if keep_S.all():
        return dists
    tail_T = dists.tail_T + np.add.reduceat(np.where(keep_S, 0, masses_S), starts_T)
    offsets_T1 = np.append(0, np.cumsum(np.add.reduceat(keep_S, starts_T, dtype=np.int64)))
    return replace(
        dists,
        offsets_T1=offsets_T1,
        ids_S=dists.ids_S[keep_S],
        logprobs_S=dists.logprobs_S[keep_S],
        tail_T=tail_T.astype(np.float32),
    )


def encode(
    dists: TokenDists, where: str, vocab_size: int, sqrt_step: float, log_bound: float, min_mass: float = 0.0
) -> bytes:
    """The payload of one block. Raises DataError, naming `where`, for distributions that no reader could use."""
    _check(dists, where, vocab_size)
    dists = prune(dists, min_mass)
    offsets_T1, first_T = dists.offsets_T1.astype(np.int64), dists.offsets_T1[:-1].astype(np.int64)
    _check_ids(dists, where)
    distinct_U, count_bits_U, ranks_S = _rank_by_count(dists.ids_S)
    token_S = np.repeat(np.arange(len(first_T)), np.diff(offsets_T1))
    order_S = np.lexsort((ranks_S, ~_is_top(dists, token_S), token_S))
    ranks_S, logprobs_S = ranks_S[order_S], dists.logprobs_S[order_S].astype(np.float64)
    levels_S = np.rint(level(logprobs_S, sqrt_step, log_bound)).clip(0, _MOST_LEVEL).astype(np.int64)
    first_S = _mask(first_T, len(levels_S))
    tail_T = _tail_codes(dists.tail_T, sqrt_step)
    derived_T = _derived_levels(_logprobs(levels_S, sqrt_step, log_bound), first_T, tail_T, sqrt_step, log_bound)
    missed_T = np.rint(level(logprobs_S[first_T], sqrt_step, log_bound) - derived_T).astype(np.int64)
    sampled_S = (dists.ids_S == dists.sampled_T[token_S])[order_S][_by_level(levels_S, first_S, token_S)]
    follows_S = ~first_S & ~_mask(first_T + 1, len(levels_S))  # has a lower rank of the same token before it
    gaps_S = ranks_S - np.where(follows_S, np.roll(ranks_S, 1) + 1, 0)
    logsumexp_T = np.rint(dists.logsumexp_T.astype(np.float64) / LOGSUMEXP_STEP).astype(np.int64)
    columns = (
        np.diff(offsets_T1) - 1,
        np.flatnonzero(sampled_S) - first_T,
        (missed_T << 1) ^ (missed_T >> 63),
        levels_S[~first_S],
        np.diff(distinct_U, prepend=0),
        count_bits_U - 1,
        ranks_S[first_S],
        gaps_S[~first_S],
        tail_T,
        logsumexp_T - logsumexp_T.min(),
    )
    coder = compressor()
    head = _HEAD.pack(len(levels_S), len(distinct_U), logsumexp_T.min())
    return head + b"".join(write_column(column, coder) for column in columns)


def decode(payload: memoryview | bytes, tokens: int, sqrt_step: float, log_bound: float) -> TokenDists:
    """What encode was given, rounded as cache_levels.py says; the payload must have passed its checksum."""
    entries, distinct, smallest = _HEAD.unpack_from(payload)
    columns = ColumnReader(payload, _HEAD.size)
    offsets_T1 = np.zeros(tokens + 1, np.int64)
    np.cumsum(columns.read(tokens).astype(np.int64) + 1, out=offsets_T1[1:])
    first_T, sampled_T = offsets_T1[:-1], columns.read(tokens)
    missed_T = columns.read(tokens).astype(np.int64)
    missed_T = (missed_T >> 1) ^ -(missed_T & 1)
    first_S = _mask(first_T, entries)
    levels_S = np.zeros(entries, np.int64)
    levels_S[~first_S] = columns.read(entries - tokens)
    distinct_U = np.cumsum(columns.read(distinct), dtype=np.int64).astype(np.int32)
    by_rank_U = distinct_U[_by_count(columns.read(distinct))]
    ranks_S = np.empty(entries, np.int64)
    ranks_S[first_S] = columns.read(tokens)
    ranks_S[~first_S] = columns.read(entries - tokens)
    starts_S = first_S | _mask(first_T + 1, entries)
    ranks_S = _running_sums(ranks_S + ~starts_S, np.flatnonzero(starts_S))
    order_S = _by_level(levels_S, first_S, np.repeat(np.arange(tokens), np.diff(offsets_T1)))
    ids_S, levels_S = by_rank_U[ranks_S[order_S]], levels_S[order_S]
    sampled_ids_T = _sampled_last(ids_S, levels_S, offsets_T1, first_T + sampled_T)
    tail_T = columns.read(tokens)
    logsumexp_T = (columns.read(tokens).astype(np.int64) + smallest) * np.float32(LOGSUMEXP_STEP)
    logprobs_S = _logprobs(levels_S, sqrt_step, log_bound)
    tail_T = _close(logprobs_S, first_T, tail_T, missed_T, sqrt_step, log_bound)
    return TokenDists(
        offsets_T1, ids_S, logprobs_S.astype(np.float32), tail_T, logsumexp_T.astype(np.float32), sampled_ids_T
    )


def _is_top(dists: TokenDists, token_S) -> np.ndarray:
    """Mask of the most likely entry of each token, the first of equals."""
    most_T = np.maximum.reduceat(dists.logprobs_S, dists.offsets_T1[:-1])
    tops = np.flatnonzero(dists.logprobs_S == most_T[token_S])
    return _mask(tops[np.unique(token_S[tops], return_index=True)[1]], len(token_S))


def _mask(places, entries: int) -> np.ndarray:
    """bool [S], True at those places that exist."""
    mask_S = np.zeros(entries + 1, bool)
    mask_S[places] = True
    return mask_S[:-1]


def _by_level(levels_S, first_S, token_S) -> np.ndarray:
    """The order that has each token's first entry first and the others most likely first."""
    return np.argsort((token_S << _LEVEL_BITS) | np.where(first_S, 0, levels_S + 1), kind="stable")


def _sampled_last(ids_S, levels_S, offsets_T1, sampled_T) -> np.ndarray:
    """The sampled ids [T]. One that is as light as the last entry changes places with it: a token that is stored for
    having been drawn alone comes last, as it did when it was captured."""
    sampled_ids_T, last_T = ids_S[sampled_T], offsets_T1[1:] - 1
    swap_T = (levels_S[sampled_T] == levels_S[last_T]) & (sampled_T > offsets_T1[:-1])
    ids_S[sampled_T[swap_T]] = ids_S[last_T[swap_T]]
    ids_S[last_T[swap_T]] = sampled_ids_T[swap_T]
    return sampled_ids_T


def _tail_codes(tail_T, sqrt_step) -> np.ndarray:
    """0 for a tail of nothing, else 1 + its level."""
    levels_T = np.rint(level(np.log(np.maximum(tail_T.astype(np.float64), 1e-300)), sqrt_step, TAIL_BOUND)).clip(0)
    return np.where(tail_T > 0, levels_T + 1, 0).astype(np.int64)


def _tails(codes_T, sqrt_step) -> np.ndarray:
    return np.where(codes_T > 0, np.exp(logprob(codes_T - 1.0, sqrt_step, TAIL_BOUND)), 0.0)


def _logprobs(levels_S, sqrt_step, log_bound) -> np.ndarray:
    """`logprob` by a table: there are far fewer levels than entries."""
    return logprob(np.arange(levels_S.max() + 1), sqrt_step, log_bound)[levels_S]


def _derived_levels(logprobs_S, first_T, tail_codes_T, sqrt_step, log_bound) -> np.ndarray:
    """Level, not rounded, of what tail and further entries leave of 1 [T]."""
    masses_S = np.exp(logprobs_S)
    masses_S[first_T] = 0
    left_T = 1 - _tails(tail_codes_T, sqrt_step) - np.add.reduceat(masses_S, first_T)
    return level(np.log(np.maximum(left_T, _SMALLEST)), sqrt_step, log_bound)


def _close(logprobs_S, first_T, tail_codes_T, missed_T, sqrt_step, log_bound) -> np.ndarray:
    """The tails [T] float32; writes the first entries, and scales the masses of tokens where they do not sum to 1."""
    derived_T = _derived_levels(logprobs_S, first_T, tail_codes_T, sqrt_step, log_bound)
    logprobs_S[first_T] = logprob(derived_T + missed_T, sqrt_step, log_bound)
    tail_T = _tails(tail_codes_T, sqrt_step)
    if missed_T.any():
        total_T = np.where(missed_T != 0, np.add.reduceat(np.exp(logprobs_S), first_T) + tail_T, 1.0)
        sizes_T = np.diff(first_T, append=len(logprobs_S))
        logprobs_S -= np.repeat(np.log(total_T), sizes_T)
        tail_T /= total_T
    return tail_T.astype(np.float32)


def _running_sums(values_S, starts) -> np.ndarray:
    """Sums within each stretch that begins at `starts` (ascending, the first 0): over all, less what came before."""
    sums_S = np.cumsum(values_S, dtype=np.int64)
    before = sums_S[starts] - values_S[starts]
    return sums_S - np.repeat(before, np.diff(starts, append=len(values_S)))


def _rank_by_count(ids_S) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Distinct ids ascending, the bits of their counts, and per entry the rank of its id, the most frequent first."""
    distinct_U, inverse_S, counts_U = np.unique(ids_S, return_inverse=True, return_counts=True)
    count_bits_U = np.frexp(counts_U)[1]
    rank_U = np.empty(len(distinct_U), np.int64)
    rank_U[_by_count(count_bits_U)] = np.arange(len(distinct_U))
    return distinct_U.astype(np.int64), count_bits_U, rank_U[inverse_S]


def _by_count(count_bits_U) -> np.ndarray:
    """Places of the ids, the most frequent first."""
    return np.argsort(-count_bits_U.astype(np.int64), kind="stable")


def _check_ids(dists: TokenDists, where: str) -> None:
    """Raises DataError where a support lacks the sampled token, or has an id twice."""
    token_S = np.repeat(np.arange(len(dists)), np.diff(dists.offsets_T1))
    hits_T = np.bincount(token_S[dists.ids_S == dists.sampled_T[token_S]], minlength=len(dists))
    pairs_S = np.sort(token_S << 32 | dists.ids_S)
    what = None
    if (hits_T == 0).any():
        what = f"the sampled token of position {np.argmax(hits_T == 0)} is not in its support"
    elif (pairs_S[1:] == pairs_S[:-1]).any():
        what = "an id is twice in a support"
    if what:
        raise DataError(what, where=where, remedy="Capture must keep the sampled token and store each id once.")


def _check(dists: TokenDists, where: str, vocab_size: int) -> None:
    offsets_T1, tokens, entries = dists.offsets_T1, len(dists.tail_T), len(dists.ids_S)
    sizes_T = np.diff(offsets_T1)
    fits = len(offsets_T1) == tokens + 1 == len(dists.sampled_T) + 1 == len(dists.logsumexp_T) + 1
    fits = fits and offsets_T1[0] == 0 and offsets_T1[-1] == entries == len(dists.logprobs_S)
    if not fits or tokens == 0 or sizes_T.min() < 1 or sizes_T.max() > 1 << 16:
        raise DataError(
            "the columns of a teacher distribution do not fit together, or a token has no support",
            where=where,
            value=(len(offsets_T1), tokens, entries),
            remedy="Every token needs 1 to 65536 support entries, the sampled token among them.",
        )
    bad_S = ~np.isfinite(dists.logprobs_S) | (dists.logprobs_S > 1e-3) | (dists.ids_S < 0) | (dists.ids_S >= vocab_size)
    bad_T = ~(dists.tail_T >= 0) | (dists.tail_T > 1.001)
    if bad_S.any() or bad_T.any():
        token = np.searchsorted(offsets_T1, np.argmax(bad_S), "right") - 1 if bad_S.any() else np.argmax(bad_T)
        raise DataError(
            f"token {token} has an id outside the {vocab_size} of the vocabulary, or a mass that is none",
            where=where,
            remedy="Store true log-probabilities (finite, <= 0) and a tail between 0 and 1.",
        )
    if not (np.abs(dists.logsumexp_T) < _MOST_LOGSUMEXP).all():
        raise DataError(
            "a logsumexp is no number",
            where=where,
            remedy="The teacher's logits hold NaN: check its weights and dtype.",
        )
