"""Whether each student's tokenizer can take what this teacher says, asked before the hours that traces take.

A tokenizer without exact bytes, one that cannot write a byte of the teacher's, a chat template that takes no question:
all of it would be found when the traces are there, and some of it when the student is trained. Making the tables of a
pair finds it in seconds, and they are kept.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from distill.align_bytes import ByteTokenizer
from distill.align_tables import default_cache_dir, load_tables
from distill.errors import ModelError
from distill.tokens import load_tokenizer, render_prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from distill.config import Config


def check_tokenizers(config: Config) -> None:
    """Returns if every student's tokenizer can be used with the teacher's. With teacher.capture, whatever a student
    learns from: the evaluation compares all of them with the teacher's distributions.

    A Hub id whose tokenizer is out of reach is only told of: who samples traces may not be who trains.
    Errors: ModelError, DataError, naming the checkpoint.
    """
    theirs = None
    for path in dict.fromkeys(student.path for student in config.students):
        own = _read(path)
        if own is None:
            continue
        render_prompt(own, "1 + 1?")
        if config.teacher.capture is not None:
            theirs = theirs or ByteTokenizer(load_tokenizer(config.teacher.path))
            load_tables(theirs, _bytes_of(own), default_cache_dir())


def _read(path: str) -> PreTrainedTokenizerFast | None:
    try:
        return load_tokenizer(path)
    except ModelError as error:
        if Path(path).is_dir():
            raise
        print(f"the tokenizer of {path} is not checked before the traces are sampled: {error.what}")
        return None


def _bytes_of(own: PreTrainedTokenizerFast) -> ByteTokenizer:
    try:
        return ByteTokenizer(own)
    except ModelError as error:
        remedy = f"{error.remedy} Or set teacher.capture: null, where every student learns from the text alone."
        raise ModelError(error.what, where=error.where, value=error.value, remedy=remedy) from error
