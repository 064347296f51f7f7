"""Drawn tokens as text, piece by piece: bytes become characters only when whole, and a stop text never shows.

Text is what the tokens' bytes say: a token may end inside a character, or inside what may become a stop text; such an
end is held back until the next token decides. The pieces of a completion add up to its text, however it was cut.
"""

import codecs
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from distill.step_log import Drawn


@dataclass(frozen=True)
class TokenLogprob:
    """One token with its log-probability at temperature 1, and the most likely ones there as (id, log-probability)."""

    token: int
    logprob: float
    top: list[tuple[int, float]]
    text_offset: int


@dataclass
class Piece:
    """What one piece of news adds to a choice. `prompt_ids` comes with the first piece alone."""

    index: int
    text: str
    token_ids: list[int]
    finish_reason: str | None = None
    stop: str | None = None
    drawn: Drawn | None = None
    logprobs: list[TokenLogprob] = field(default_factory=list)


class Tokens:
    """The bytes of each id, and their written form."""

    def __init__(self, token_bytes: Sequence[bytes], stop_ids: Sequence[int]):
        self.bytes, self.stop_ids = token_bytes, frozenset(stop_ids)

    def text(self, token: int, as_id: bool) -> str:
        """The token as a key of a JSON object; bytes that are no text are written as OpenAI does."""
        if as_id:
            return f"token_id:{token}"
        try:
            return self.bytes[token].decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in self.bytes[token])


class Choice:
    """One completion of a request, from the first token to the last."""

    def __init__(self, index: int, tokens: Tokens, stops: Sequence[str], top: int | None):
        self.index, self._tokens, self._top = index, tokens, top
        self._stops = [stop.encode() for stop in stops]
        self._held = b""
        self._decoder, self._offsets = (codecs.getincrementaldecoder("utf-8")("replace") for _ in range(2))
        self._offset = 0
        self.completion_tokens = 0

    def add(self, drawn: Drawn) -> Piece:
        """The piece that this news adds."""
        self.completion_tokens += len(drawn.token_ids)
        by_id = drawn.finish_reason == "stop" and drawn.stop is None
        shown = drawn.token_ids[:-1] if by_id else drawn.token_ids
        ended = drawn.finish_reason is not None
        self._held += b"".join(self._tokens.bytes[token] for token in shown)
        if drawn.stop is not None:
            self._held = self._held[: min(at for stop in self._stops if (at := self._held.find(stop)) >= 0)]
        keep = 0 if ended else self._undecided()
        ready, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        text = self._decoder.decode(ready, final=ended)
        logprobs = [] if self._top is None else self._logprobs(drawn, len(shown))
        return Piece(self.index, text, drawn.token_ids, drawn.finish_reason, drawn.stop, drawn, logprobs)

    def _undecided(self) -> int:
        """How many of the last bytes may be the beginning of a stop text."""
        longest = max((len(stop) - 1 for stop in self._stops), default=0)
        for size in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-size:]) for stop in self._stops):
                return size
        return 0

    def _logprobs(self, drawn: Drawn, shown: int) -> list[TokenLogprob]:
        dists, found = drawn.dists, []
        bounds, ids, logprobs = dists.offsets_T1.tolist(), dists.ids_S.tolist(), dists.logprobs_S.tolist()
        for t, token in enumerate(drawn.token_ids[:shown]):
            first, last = bounds[t], bounds[t + 1]
            own = logprobs[ids.index(token, first, last)]
            top = list(zip(ids[first : first + self._top], logprobs[first : first + self._top]))[: last - first]
            found.append(TokenLogprob(token, own, top, self._offset))
            self._offset += len(self._offsets.decode(self._tokens.bytes[token]))
        return found


def short(logprob: float) -> float:
    """Six decimals, which is what float32 knows of a log-probability; -9999 for minus infinity, which JSON lacks."""
    return round(logprob, 6) + 0.0 if math.isfinite(logprob) else -9999.0
