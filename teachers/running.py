"""What the paged loop knows of a row that is being drawn, and of a prompt that rows wait for."""

from dataclasses import dataclass, field

from distill.generate import Row
from distill.row_settings import StopTexts


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
