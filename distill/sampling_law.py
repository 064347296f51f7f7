"""The law that a trace's tokens were drawn from, out of the teacher's stored distribution at temperature 1.

Traces are drawn colder than the teacher's own distribution and from its nucleus. Cross-entropy on such a trace is a
one-sample estimate of cross-entropy against that law, not against the teacher at temperature 1; with the law itself as
the target of the divergence a student learns the same as from ever more traces of the same prompts, without the noise.

The law is known from a stored support wherever the filters end inside it, which top_p < 1 nearly always does: the tail
of a position is at most tail_bound, and at T <= 1 it weighs less than that.

Shape legend: T positions, S support entries of all positions, the most likely of a position first.
"""

from dataclasses import replace

import numpy as np

from distill.errors import ConfigError
from distill.records import SamplingParams, TokenDists


def check_law(params: SamplingParams) -> None:
    """Returns if the law can be told from a stored support, else ConfigError: hotter than 1, a tail has no bound."""
    if params.temperature > 1:
        raise ConfigError(
            "the law of traces drawn hotter than temperature 1 is not known from the stored part of a distribution",
            where="teacher.sampling.temperature",
            value=params.temperature,
            remedy="Set students.N.loss.target: teacher.",
        )


def sampling_law(dists: TokenDists, params: SamplingParams, drawn: bool = True) -> TokenDists:
    """The distributions after temperature and filters, in the order and meaning of distill.sampling.draw.

    Entries outside a filter are gone; those that stay and the tail sum to 1. A tail that no filter ends keeps at most
    its share: tokens that are not stored are taken to be as likely as the last that is. The drawn token always stays;
    where the text was not drawn by this law, its token may be outside.
    Errors: ConfigError as check_law.
    """
    check_law(params)
    first_T, sizes_T = dists.offsets_T1[:-1], np.diff(dists.offsets_T1)
    token_S = np.repeat(np.arange(len(dists)), sizes_T)
    rank_S = np.arange(len(token_S)) - first_T[token_S]
    best_T = dists.logprobs_S[first_T].astype(np.float64)
    gap_S = dists.logprobs_S.astype(np.float64) - best_T[token_S]  # log of the mass over that of the most likely
    drawn_S = (dists.ids_S == dists.sampled_T[token_S]) & drawn
    if params.temperature == 0:
        return _kept(dists, token_S, (rank_S == 0), np.zeros(len(token_S)), np.zeros(len(dists)))
    weight_S = np.exp(gap_S / params.temperature)
    last_T = gap_S[dists.offsets_T1[1:] - 1]
    tail_T = dists.tail_T * np.exp(-best_T + (1 / params.temperature - 1) * last_T)
    kept_S = np.ones(len(token_S), bool)
    if params.top_k > 0:
        kept_S &= rank_S < params.top_k
        tail_T = np.where(sizes_T >= params.top_k, 0.0, tail_T)
    if params.top_p < 1:
        weight_S = np.where(kept_S, weight_S, 0.0)
        before_S, total_T = _before(weight_S, first_T, token_S)
        total_T = total_T + tail_T
        inside_S = before_S < params.top_p * total_T[token_S]
        inside_S |= rank_S == 0
        tail_T = np.where(total_T - tail_T >= params.top_p * total_T, 0.0, tail_T)
        kept_S &= inside_S
    if params.min_p > 0:
        kept_S &= weight_S >= params.min_p
        tail_T = np.where(np.exp(last_T / params.temperature) < params.min_p, 0.0, tail_T)
    return _kept(dists, token_S, kept_S | drawn_S, gap_S / params.temperature, tail_T)


def _before(weight_S: np.ndarray, first_T: np.ndarray, token_S: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(the weight of a position's entries before each, that of all of them)."""
    ends_S = np.cumsum(weight_S)
    start_T = np.append(0.0, ends_S)[first_T]
    total_T = np.add.reduceat(weight_S, first_T)
    return ends_S - weight_S - start_T[token_S], total_T


def _kept(
    dists: TokenDists, token_S: np.ndarray, kept_S: np.ndarray, log_weight_S: np.ndarray, tail_T: np.ndarray
) -> TokenDists:
    """The entries of kept_S and the tail, normalised."""
    token_S, log_weight_S = token_S[kept_S], log_weight_S[kept_S]
    total_T = np.bincount(token_S, np.exp(log_weight_S), minlength=len(dists)) + tail_T
    offsets_T1 = np.append(0, np.cumsum(np.bincount(token_S, minlength=len(dists))))
    return replace(
        dists,
        offsets_T1=offsets_T1.astype(np.int64),
        ids_S=dists.ids_S[kept_S],
        logprobs_S=(log_weight_S - np.log(total_T)[token_S]).astype(np.float32),
        tail_T=(tail_T / total_T).astype(np.float32),
    )
