"""Answers in OpenAI's shapes: whole, and as the chunks of a stream, for completions and for chats."""

import base64
import json
import secrets
import time
from dataclasses import dataclass, field
from typing import Any

from distill import wire
from teachers.service_text import Piece, TokenLogprob, Tokens, short


@dataclass
class Shape:
    """How one request is answered."""

    model: str
    fingerprint: str
    tokens: Tokens
    chat: bool
    with_logprobs: bool
    with_ids: bool
    with_dists: bool
    tokens_as_ids: bool
    prompts: list[tuple[int, ...]]
    n: int
    id: str = field(default_factory=lambda: secrets.token_hex(12))
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, pieces: list[Piece], completion_tokens: int) -> bytes:
        """The body of an answer that was not streamed; pieces hold a whole choice each."""
        choices = [self._choice(piece, first=True, streamed=False) for piece in pieces]
        return _coded(self._frame(choices, streamed=False) | {"usage": self.usage(completion_tokens)})

    def opening(self) -> list[dict]:
        """Chunks before the first token: a chat names the role of each choice."""
        if not self.chat:
            return []
        roles = [
            {"index": index, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
            for index in range(len(self.prompts) * self.n)
        ]
        return [self._frame([role], streamed=True) for role in roles]

    def chunk(self, piece: Piece, first: bool) -> dict:
        return self._frame([self._choice(piece, first, streamed=True)], streamed=True)

    def closing(self, completion_tokens: int) -> dict:
        """The chunk with the usage, for those who asked for it."""
        return self._frame([], streamed=True) | {"usage": self.usage(completion_tokens)}

    def usage(self, completion_tokens: int) -> dict:
        prompt_tokens = sum(map(len, self.prompts))
        return {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
        }

    def _frame(self, choices: list[dict], streamed: bool) -> dict:
        kind = ("chat.completion.chunk" if streamed else "chat.completion") if self.chat else "text_completion"
        return {
            "id": ("chatcmpl-" if self.chat else "cmpl-") + self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
            "choices": choices,
        }

    def _choice(self, piece: Piece, first: bool, streamed: bool) -> dict:
        found: dict[str, Any] = {"index": piece.index}
        if not self.chat:
            found["text"] = piece.text
        elif streamed:
            found["delta"] = {"content": piece.text}
        else:
            found["message"] = {"role": "assistant", "content": piece.text, "refusal": None}
        found["logprobs"] = self._logprobs(piece) if self.with_logprobs else None
        found["finish_reason"] = piece.finish_reason
        if piece.stop is not None:
            found["stop_reason"] = piece.stop
        if self.with_ids:
            found["token_ids"] = piece.token_ids
            if first:
                found["prompt_token_ids"] = list(self.prompts[piece.index // self.n])
        if self.with_dists:
            found["dists"] = base64.b64encode(wire.pack(piece.drawn.dists)).decode()
        return found

    def _logprobs(self, piece: Piece) -> dict:
        if self.chat:
            return {"content": [self._chat_token(each) for each in piece.logprobs], "refusal": None}
        text = self.tokens.text
        top = [{text(i, self.tokens_as_ids): short(x) for i, x in reversed(each.top)} for each in piece.logprobs]
        return {
            "tokens": [text(each.token, self.tokens_as_ids) for each in piece.logprobs],
            "token_logprobs": [short(each.logprob) for each in piece.logprobs],
            "top_logprobs": [dict(reversed(each.items())) for each in top],
            "text_offset": [each.text_offset for each in piece.logprobs],
        }

    def _chat_token(self, token: TokenLogprob) -> dict:
        top = [self._chat_entry(i, logprob) for i, logprob in token.top]
        return self._chat_entry(token.token, token.logprob) | {"top_logprobs": top}

    def _chat_entry(self, token: int, logprob: float) -> dict:
        written = f"token_id:{token}" if self.tokens_as_ids else self.tokens.bytes[token].decode(errors="replace")
        return {"token": written, "logprob": short(logprob), "bytes": list(self.tokens.bytes[token])}


def event(content: dict) -> bytes:
    """One event of a stream."""
    return b"data: " + _coded(content) + b"\n\n"


DONE = b"data: [DONE]\n\n"


def _coded(content: dict) -> bytes:
    return json.dumps(content, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()
