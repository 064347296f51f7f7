"""Texts that the teacher only read (teachers/texts.py), as a set of examples beside the traces it wrote.

Every trained token has the teacher's distribution behind it and none is a sample of it: the loss is the divergence
alone. A student with another tokenizer has targets that hang on nothing the text says later (distill.align_read).
"""

from collections import Counter
from collections.abc import Collection

from transformers import PreTrainedTokenizerFast

from distill.config_mixture import TextSet
from distill.conversations import Row, read_turns
from distill.errors import DataError
from distill.logit_cache import CacheReader
from distill.prompts import normalised
from distill.store import StageFolder
from distill.tokens import fingerprint
from students.aligned import AlignedSignal
from students.data import Example, TraceData, fit


def load_texts(
    each: TextSet,
    stage: StageFolder,
    tokenizer: PreTrainedTokenizerFast,
    teacher_path: str,
    traces: TraceData | None,
    *,
    max_seq_tokens: int,
    too_long: str = "drop",
    asked: Collection[str] = (),
) -> TraceData:
    """The texts of a finished stage in the student's tokens, each with the teacher's distributions.

    traces: the run's own, whose law is learned here too and which say how cuts agree; None for none. asked: what the
    evaluation asks (normalised), which is left out. counts: texts; overlapping; refused, where the conversation holds
    one of the student's special tokens; too_long and, with another tokenizer, positions_KIND.
    Errors: DataError when nothing is left or the file was changed.
    """
    theirs = stage.manifest["fingerprints"]["tokenizer"]
    caches = _open(stage, theirs)
    aligned = None if fingerprint(tokenizer) == theirs else AlignedSignal(teacher_path, tokenizer, theirs)
    rows = {row.key: row for row in read_turns(each.source, Counter())}
    counts, examples = Counter(texts=0, overlapping=0, refused=0, too_long=0), []
    for shard, reader in caches.items():
        found = []
        for key in reader.keys():  # noqa: SIM118
            row = _row(rows, key, each, stage)
            counts["texts"] += 1
            if any(normalised(question) in asked for question in row.questions):
                counts["overlapping"] += 1
                continue
            try:
                found.append((key, row.prompt_ids(tokenizer), reader[key].sampled_T.tolist()))
            except DataError:
                counts["refused"] += 1
        completions = [ids for _, _, ids in found] if aligned is None else aligned.completions([f[2] for f in found])
        shard_examples = [
            Example(key, prompt_ids, completion_ids, shard, ids)
            for (key, prompt_ids, ids), completion_ids in zip(found, completions)
        ]
        examples += fit(shard_examples, max_seq_tokens, too_long, counts)
    if not examples:
        raise DataError(
            f"no text is left to train on: {dict(counts)}",
            where=f"train.text_sets {each.name}",
            remedy="Raise train.max_seq_tokens where they are too long, or give others.",
        )
    data = TraceData(examples, caches, counts, aligned, traces and traces.law, drawn=False)
    counts.update(trained_tokens=sum(data.trained), input_tokens=sum(data.lengths))
    if aligned is not None:
        counts.update(aligned.finish(traces and traces.aligned))
    return data


def _open(stage: StageFolder, theirs: str) -> dict[str, CacheReader]:
    caches = {}
    for shard in stage.shards():
        reader = caches[shard.name.removesuffix(".cache")] = CacheReader(stage.check_shard(shard.name).path)
        reader.require(tokenizer_fingerprint=theirs, complete=True, sampled=False)
    return caches


def _row(rows: dict[str, Row], key: str, each: TextSet, stage: StageFolder) -> Row:
    if key not in rows:
        raise DataError(
            f"the teacher read a text ({key}) that is no longer there",
            where=each.source.path,
            remedy=f"Put the file back, or delete {stage.path} and run again: it is read again.",
        )
    return rows[key]
