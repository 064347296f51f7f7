"""What the paged loop knows of a row that is being drawn, and of a prompt that rows wait for."""

from dataclasses import dataclass, field

import numpy as np

from distill.errors import ModelError
from distill.generate import Row
from distill.row_settings import StopTexts
from distill.sampling import Support
from distill.step_log import StepLog
from teachers.steps import rows_of


@dataclass(eq=False)
class Running:
    """One row: `cached` tokens in its pages, `drawn` tokens, counting those the host has not read."""

    row: Row
    owner: int
    pages: list[int] = field(default_factory=list)
    cached: int = 0
    drawn: int = 0
    tokens: list[int] = field(default_factory=list)  # those read
    closed: bool = False
    stop: StopTexts | None = None

    @property
    def budget(self) -> int:
        return self.row.params.max_new_tokens


@dataclass(eq=False)
class Prompt:
    """Tokens to prefill for rows that share them. A row that resumes knows its next token already."""

    ids: tuple[int, ...]
    rows: list[Running]
    done: int = 0

    @property
    def resumes(self) -> bool:
        return bool(self.rows[0].tokens)


def keep(log: StepLog, drawing: list[Running], token_A: np.ndarray, support: Support | None) -> None:
    """Logs one token of each of these rows, with its distribution where the row captures."""
    if support is not None and not support.logsumexp_A.isfinite().all():
        raise ModelError(
            "the model's logits are not finite numbers",
            where=f"prompt {drawing[0].row.request.key} or one drawn beside it",
            remedy="Check the checkpoint: a damaged or wrongly converted weight does this.",
        )
    owner_A, token_A = np.array([running.owner for running in drawing]), token_A.astype(np.int64)
    captured = [a for a, running in enumerate(drawing) if running.row.capture]
    if captured:
        log.add(owner_A[captured], token_A[captured], rows_of(support, captured, len(drawing)))
    if len(captured) < len(drawing):
        bare = [a for a, running in enumerate(drawing) if not running.row.capture]
        log.add(owner_A[bare], token_A[bare], None)
