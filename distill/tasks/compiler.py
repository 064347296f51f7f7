"""The compiler of worked solutions: parses a prompt to a syntax tree, walks it, and says each step in words.

The bundled teacher is trained on these; the students only ever see what the teacher samples. The solver reads the
prompt's text, never its answer, so the law `work_out(prompt).answer == prompt.answer` checks both.
"""

import random
from dataclasses import dataclass

from distill.errors import DataError
from distill.records import Prompt
from distill.tasks import solvers
from distill.tasks.scribe import Scribe

SOLVERS = {
    "chain_sum": solvers.chain_sum,
    "basic_arithmetic": solvers.basic_arithmetic,
    "products": solvers.products,
    "gcd": solvers.gcd,
    "simple_equations": solvers.simple_equations,
    "leg_counting": solvers.leg_counting,
    "spell_backward": solvers.spell_backward,
    "letter_counting": solvers.letter_counting,
    "count_bits": solvers.count_bits,
}


@dataclass(frozen=True)
class Worked:
    """A worked solution: the steps in words, one a line, and the answer they reach."""

    reasoning: str
    answer: str


def work_out(prompt: Prompt, rng: random.Random, slip: float = 0.04, confirm: float = 0.04) -> Worked:
    """The worked solution of a prompt of one of the nine families; deterministic given `rng`.

    slip: probability that a step is first wrong and corrected at once; confirm: that a right step is checked aloud.
    DataError when the family has no solver or the text does not read like it.
    """
    solver = SOLVERS.get(prompt.family)
    if solver is None:
        raise DataError(
            "no worked solutions for this family",
            where="tasks.compiler",
            value=prompt.family,
            remedy=f"Use one of {', '.join(sorted(SOLVERS))}.",
        )
    scribe = Scribe(rng, slip, confirm)
    answer = solver(scribe, prompt.text)
    return Worked(scribe.text(), answer)
