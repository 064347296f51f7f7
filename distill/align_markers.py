"""Tokens that are no text, matched between two tokenizers by what they mean.

"<think>" and "</think>", the end of a turn, what opens a user's and an assistant's turn, the beginning of a sequence:
their written forms differ, so no bytes relate them; their meaning is read from the chat templates. A marker that the
student does not hold as one token is text to it, encoded apart from its surroundings.
"""

from __future__ import annotations

from distill.align_bytes import ByteTokenizer
from distill.tokens import THINK_CLOSE, THINK_OPEN, end_id, stop_ids

_QUESTION, _ANSWER = "~question~", "~answer~"


def match_markers(teacher: ByteTokenizer, student: ByteTokenizer) -> dict[int, list[int]]:
    """Teacher id -> student ids, for every teacher token that is no text.

    By meaning; else the student's token of the same written form; else the written form as plain text.
    """
    own = meanings(student)
    found = {}
    for meaning, ids in meanings(teacher).items():
        for index in ids if meaning in own else []:
            found.setdefault(index, own[meaning][:1])
    rest = {content: index for content, index in teacher.added.items() if index not in found}
    found |= {index: [student.added[content]] for content, index in rest.items() if content in student.added}
    as_text = [index for index in rest.values() if index not in found]
    pieces = student.encode([teacher.bytes_V[index] for index in as_text])
    return found | {index: each.tolist() for index, each in zip(as_text, pieces)}


def meanings(tokenizer: ByteTokenizer) -> dict[str, list[int]]:
    """Meaning -> the ids that have it, the one that the chat template writes first.

    An opener is the first token of what the template writes before a message, behind the end of the turn before.
    """
    tok, added = tokenizer.tokenizer, tokenizer.added
    end = end_id(tok)
    found = {text: [added[text]] for text in (THINK_OPEN, THINK_CLOSE) if text in added}
    found["end"] = [end, *(index for index in stop_ids(tok) if index != end)]
    if tok.bos_token_id is not None and tok.bos_token_id not in found["end"]:
        found["begin"] = [tok.bos_token_id]
    taken = {index for ids in found.values() for index in ids}
    text = tok.apply_chat_template(
        [{"role": "user", "content": _QUESTION}, {"role": "assistant", "content": _ANSWER}], tokenize=False
    )
    head, _, rest = text.partition(_QUESTION)
    for role, opening in (("user", head), ("assistant", rest.partition(_ANSWER)[0])):
        openers = [index for index in _added_in(opening, added) if index not in taken]
        if openers:
            found[role] = openers[:1]
    return found


def _added_in(text: str, added: dict[str, int]) -> list[int]:
    """Added tokens in the order of their first place in the text, the longest first at the same place."""
    places = [(text.find(content), -len(content), index) for content, index in added.items() if content in text]
    return [index for _, _, index in sorted(places)]
