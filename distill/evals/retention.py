"""What a student kept of its base: short general questions the training says nothing about, answered greedily.

Legend: P problems, K = 1 greedy answer of each.
"""

import random
from collections.abc import Sequence

from distill.errors import DataError
from distill.evals import stats
from distill.evals.results import EvalResult
from distill.records import Prompt, SamplingParams
from distill.tasks.general import KINDS, general_item
from distill.tasks.split import is_heldout

SET_NAME = "retention"
_MAX_DRAWS = 200  # draws per wanted question before a kind counts as exhausted


def general_prompts(per_kind: int, seed: int = 0, kinds: Sequence[str] = KINDS) -> list[Prompt]:
    """`per_kind` distinct held-out questions of each kind, the same for the same seed, whatever the other kinds.

    A kind with too few held-out questions gives as many as it has. DataError when that is none.
    """
    prompts: dict[str, Prompt] = {}
    for kind in kinds:
        rng, found = random.Random(f"retention/{seed}/{kind}"), {}
        for _ in range(per_kind * _MAX_DRAWS):
            if len(found) == per_kind:
                break
            prompt = general_item(kind, rng)
            if is_heldout(prompt) and prompt.key not in prompts:
                found[prompt.key] = prompt
        if not found:
            raise DataError("no held-out question of this kind was found", where="retention", value=kind)
        prompts |= found
    return list(prompts.values())


def retention_params(max_new_tokens: int) -> SamplingParams:
    """Greedy: retention asks what a model answers, not how its answers vary."""
    return SamplingParams(temperature=0.0, top_p=1.0, top_k=0, max_new_tokens=max_new_tokens)


def compare_retention(result: EvalResult, base: EvalResult, confidence: float = 0.95) -> list[dict]:
    """Rows of the report: a model's accuracy on each kind and on all, with intervals, against its base's.

    Each row: model, role, base, kind, n, accuracy, ci_low, ci_high, base_accuracy, and for a model other than the base
    the paired difference with interval and p-value. Grader errors are left out.
    """
    if [p.key for p in result.prompts] != [p.key for p in base.prompts]:
        raise DataError("retention of a model and its base was measured on different questions", where="5-eval")
    families = [p.family for p in result.prompts]
    rows = []
    for kind in [*dict.fromkeys(families), "all"]:
        chosen = [kind in (family, "all") for family in families]
        rows.append(_row(result, base, kind, chosen, confidence))
    return rows


def _row(result: EvalResult, base: EvalResult, kind: str, chosen: list[bool], confidence: float) -> dict:
    mine_PK, theirs_PK = result.correctness_PK[chosen], base.correctness_PK[chosen]
    mine, theirs = stats.pass_at_1(mine_PK, confidence), stats.pass_at_1(theirs_PK, confidence)
    row = {"model": result.candidate.name, "role": result.candidate.role, "base": base.candidate.name, "kind": kind}
    row |= {"n": mine.n_problems, "accuracy": mine.value, "ci_low": mine.low, "ci_high": mine.high}
    row["base_accuracy"] = theirs.value
    if result.candidate.name != base.candidate.name:
        paired = stats.paired_difference(mine_PK, theirs_PK, confidence)
        row |= {"difference": paired.difference, "difference_low": paired.low, "difference_high": paired.high}
        row["p_value"] = paired.p_value
    return row
