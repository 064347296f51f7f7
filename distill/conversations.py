"""Conversations and texts from files that no teacher wrote, and which of them it can read.

Every turn of the assistant is a text of its own, after the conversation before it.
"""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from transformers import PreTrainedTokenizerFast

from distill import prompts
from distill.config_mixture import GeneralSource, TextSource
from distill.errors import DataError
from distill.records import prompt_key
from distill.tokens import THINK_CLOSE, encode_completion, end_id, render_chat, split_thinking, token_bytes

REJECTED = ("no_assistant", "duplicate", "refused", "not_round_trip", "too_long")


@dataclass(frozen=True)
class Row:
    """One conversation that ends with the assistant, or one plain text (messages empty)."""

    messages: tuple[tuple[str, str], ...]
    text: str = ""
    calls_tools: bool = False  # a message says more than its content, which has no place here: it cannot be read

    @property
    def key(self) -> str:
        return prompt_key(self.text or json.dumps(self.messages, ensure_ascii=False))

    @property
    def is_broken(self) -> bool:
        """Whether it holds half a character, which JSON can write and UTF-8 cannot."""
        return any(prompts.SURROGATE.search(text) for text in [self.text, *(part for m in self.messages for part in m)])

    @property
    def questions(self) -> list[str]:
        """What must not be asked in the evaluation."""
        return [content for role, content in self.messages if role == "user"] or [self.text]

    @property
    def answer(self) -> str:
        """What the assistant writes behind "<think>\\n": its reasoning, or none, the closing tag and the answer."""
        thinking, answer = split_thinking(self.messages[-1][1])
        thinking, answer = ("", thinking) if answer is None else (thinking, answer)
        return f"{thinking}{THINK_CLOSE}\n{answer}"

    def prompt_ids(self, tokenizer: PreTrainedTokenizerFast) -> list[int]:
        """Up to where the assistant answers; of plain text its first token. DataError for a message that holds one of
        the tokenizer's special tokens, or calls a tool."""
        if self.calls_tools:
            raise DataError("a message calls a tool", remedy="Leave such conversations out, or write calls as text.")
        if not self.messages:
            return encode_completion(tokenizer, self.text)[:1]
        return render_chat(tokenizer, [{"role": role, "content": content} for role, content in self.messages[:-1]])

    def completion_ids(self, tokenizer: PreTrainedTokenizerFast) -> list[int]:
        """The data's own answer, with its end token; of plain text all but the first token."""
        if not self.messages:
            return encode_completion(tokenizer, self.text)[1:]
        return [*encode_completion(tokenizer, self.answer), end_id(tokenizer)]


def rows_of(source: GeneralSource) -> Iterator[Row]:
    """The rows of a file or data set, each a conversation that ends with the assistant, or a text; DataError for
    another, and for half a character."""
    for where, found in prompts.source_rows(source, [source.field]):
        value = found.get(source.field)
        if isinstance(value, str) and value.strip():
            row = Row((), value)
        elif _is_list_of_messages(value) and len(value) > 1 and value[-1]["role"] == "assistant":
            row = _row(value)
        else:
            raise DataError(
                f"the field {source.field!r} is neither text nor a conversation that ends with the assistant",
                where=where,
                value=str(value)[:80],
                remedy="Write [{role: user, content: ...}, {role: assistant, content: ...}], or name another field.",
            )
        if row.is_broken:
            raise DataError("holds half a character", where=where, remedy="Remove the escape \\uD800 to \\uDFFF.")
        yield row


def _is_list_of_messages(value: object) -> bool:
    return isinstance(value, list) and all(
        isinstance(m, dict) and isinstance(m.get("content"), str) and isinstance(m.get("role"), str) and m["role"]
        for m in value
    )


def _row(messages: list[dict]) -> Row:
    calls_tools = any(message.get("tool_calls") or message.get("function_call") for message in messages)
    return Row(tuple((message["role"], message["content"]) for message in messages), calls_tools=calls_tools)


def read_turns(source: TextSource, counts: Counter) -> list[Row]:
    """The assistant's turns of all conversations of a source, each once.

    counts: read (conversations), turns; no_assistant (conversations without an answer to anything), duplicate, refused
    (turns with or after a tool call) and, where JSON holds half a character, not_round_trip are added.
    Errors: DataError for a row that is no conversation, or when nothing is left.
    """
    rows: dict[str, Row] = {}
    for where, found in prompts.source_rows(source, [source.field]):
        messages = found.get(source.field)
        if not _is_list_of_messages(messages):
            raise DataError(
                f"the field {source.field!r} is no conversation",
                where=where,
                value=str(messages)[:80],
                remedy="Write [{role: user, content: ...}, {role: assistant, content: ...}], or name another field.",
            )
        counts["read"] += 1
        turns = [i for i, m in enumerate(messages) if i and m["role"] == "assistant" and m["content"].strip()]
        counts["no_assistant"] += not turns
        for i in turns:
            row = _row(messages[: i + 1])
            if row.calls_tools:
                counts["refused"] += 1
            elif row.is_broken:
                counts["not_round_trip"] += 1
            else:
                counts["duplicate"] += rows.setdefault(row.key, row) is not row
    counts["turns"] += len(rows)
    if not rows:
        raise DataError(
            f"no conversation of {counts['read']} holds an answer of the assistant that can be read: {dict(counts)}",
            where=source.path,
            remedy="Give conversations with role: assistant, an answer and no tool call in them.",
        )
    return list(rows.values())


class Readable:
    """Which turns a model with this tokenizer can read, in its tokens. max_tokens: of the whole conversation."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, max_tokens: int):
        self.tokenizer, self.max_tokens, self._bytes_V = tokenizer, max_tokens, token_bytes(tokenizer)

    def ids(self, row: Row) -> tuple[list[int], list[int]] | str:
        """(prompt, completion), or why not: one of REJECTED."""
        try:
            prompt_ids = row.prompt_ids(self.tokenizer)
        except DataError:
            return "refused"  # a special token in a message, or roles that the chat template does not take
        completion_ids = row.completion_ids(self.tokenizer)
        if b"".join(self._bytes_V[i] for i in completion_ids[:-1]) != row.answer.encode():
            return "not_round_trip"  # a normalizer wrote it otherwise
        if len(prompt_ids) + len(completion_ids) > self.max_tokens:
            return "too_long"
        return prompt_ids, completion_ids
