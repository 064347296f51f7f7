"""Probabilities <-> integer levels: the rounding of the teacher cache, and what it costs.

A relative error e in a mass p costs p e^2 / 2 nats of KL, so for a given KL the cheapest rounding has errors
proportional to 1 / sqrt(p): levels that are uniform in sqrt(p). Each entry then costs SQRT_STEP^2 / 6 nats on average,
whatever its mass. Small masses would lose all digits that way, which reverse KL feels; so no log-probability is off by
more than LOG_BOUND, and below the mass where that binds levels are uniform in log p:

    level(p) = (1 - sqrt p) / SQRT_STEP                  where sqrt p >= SQRT_STEP / LOG_BOUND =: knee
    level(p) = level(knee^2) + log(knee^2 / p) / (2 LOG_BOUND)    below

which is continuous with a continuous slope, 0 at p = 1 and growing as p falls.

Shape legend: S entries in a row.
"""

import numpy as np

SQRT_STEP = 1 / 128
LOG_BOUND = 0.25  # nats
TAIL_BOUND = 1 / 32  # nats, of the tail mass: LOG_BOUND suits a small entry, but the tail of every token bears loss
LOGSUMEXP_STEP = 1 / 16  # nats


def level(logprobs_S: np.ndarray, sqrt_step: float = SQRT_STEP, log_bound: float = LOG_BOUND) -> np.ndarray:
    """float64 levels, not yet rounded, of log-probabilities in nats; those above 0 have negative levels."""
    knee = sqrt_step / log_bound
    logprobs_S = np.asarray(logprobs_S, np.float64)
    below_S = (2 * np.log(knee) - logprobs_S) / (2 * log_bound)
    return np.where(below_S > 0, (1 - knee) / sqrt_step + below_S, (1 - np.exp(logprobs_S / 2)) / sqrt_step)


def logprob(levels_S: np.ndarray, sqrt_step: float = SQRT_STEP, log_bound: float = LOG_BOUND) -> np.ndarray:
    """float64 log-probabilities in nats of levels, integer or not: the inverse of `level`."""
    knee = sqrt_step / log_bound
    below_S = np.asarray(levels_S, np.float64) - (1 - knee) / sqrt_step
    near_S = 2 * np.log(np.maximum(1 - levels_S * sqrt_step, knee))
    return np.where(below_S > 0, 2 * np.log(knee) - below_S * (2 * log_bound), near_S)
