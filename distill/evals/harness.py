"""One harness for teacher, base and students: the same prompts, seeds and grader, in shards that resume.

Legend: P problems, K samples of each.

A shard is `<set>-<model>-<number>.parquet`: one row a prompt, its K samples in lists. Where distributions are captured,
a `.cache` of the same name holds those of sample 0 of each prompt: agreement with the teacher is measured on them.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from distill.errors import DataError, StoreError
from distill.evals.results import SCHEMA, Candidate, EvalResult, load_result, slug
from distill.logit_cache import CacheWriter, cache_header
from distill.records import CaptureSpec, Prompt, Sample, SampleRequest, SamplingParams, Verdict
from distill.store import StageFolder
from distill.tokens import render_prompt, sample_requests, stop_ids
from distill.traceset import prompt_row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class Sampler(Protocol):
    """What draws completions: the teacher's engine, a student's rollout, or a client of a service."""

    def sample(
        self, requests: Sequence[SampleRequest], params: SamplingParams, capture: CaptureSpec | None
    ) -> Iterable[Sample]: ...


class Grader(Protocol):
    """What judges completions: of (prompt, completion text, finish reason) each its verdict, extracted and detail."""

    def grade(self, items: Iterable[tuple[Prompt, str, str]]) -> Sequence[Any]: ...


def evaluate(
    candidate: Candidate,
    sampler: Sampler,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[Prompt],
    params: SamplingParams,
    k: int,
    grader: Grader,
    folder: StageFolder,
    *,
    run_seed: int = 0,
    set_name: str = "eval",
    capture: CaptureSpec | None = None,
    shard_prompts: int = 32,
    rank: int = 0,
    world: int = 1,
    devices: int = 1,
    writes: bool = True,
    barrier: Callable[[], None] = lambda: None,
    progress: bool = True,
) -> EvalResult:
    """The result over all prompts, after every shard that was missing has been sampled and graded.

    The sample of (prompt, index) has the same seed for every model. The missing shards are dealt out to the `world`
    ranks in turn; `barrier` is called before the first and after the last sample, so all ranks see the same shards
    missing and get the whole result. If any shard is missing EVERY rank calls the sampler, perhaps with no request:
    ranks that share a sharded model need that. All requests go out as one stream, so the batch stays full across
    shards; a kill costs what was in flight. `devices`: how many this rank's sampler runs on, for the ledger. Several
    ranks of one number (a tensor-parallel group) draw the same samples, and only one of them `writes`.

    Errors: DataError for no or duplicate prompts, or a sampler that returns other samples than asked for; StoreError
    when a finished shard was made by other prompts, sampling settings, seed or weights.
    """
    _check_prompts(prompts)
    identity = _identity(candidate, prompts, params, k, run_seed, capture, shard_prompts)
    plan = _plan(candidate, prompts, set_name, shard_prompts)
    missing = [shard for shard in plan if not _is_finished(folder, shard.name, identity, capture)]
    barrier()
    if missing:
        mine, total = missing[rank::world], sum(len(shard.prompts) for shard in missing) * k
        info = {"set": set_name, "identity": identity, **candidate.__dict__}
        maker = _ShardMaker(tokenizer, grader, folder, run_seed, k, capture, info, devices)
        title = f"eval {candidate.name}" if set_name == "eval" else f"{set_name} {candidate.name}"
        done = len(prompts) * k - total
        with _bar(title, done // world, len(prompts) * k // world, progress and writes and rank == 0) as bar:
            maker.run(mine, sampler, params, bar, writes)
    barrier()
    return load_result(folder, candidate.name, set_name)


def is_evaluated(
    candidate: Candidate,
    folder: StageFolder,
    *,
    prompts: Sequence[Prompt],
    params: SamplingParams,
    k: int,
    run_seed: int = 0,
    set_name: str = "eval",
    capture: CaptureSpec | None = None,
    shard_prompts: int = 32,
) -> bool:
    """True if evaluate with the same arguments would sample nothing; raises what evaluate would."""
    _check_prompts(prompts)
    identity = _identity(candidate, prompts, params, k, run_seed, capture, shard_prompts)
    plan = _plan(candidate, prompts, set_name, shard_prompts)
    return all(_is_finished(folder, shard.name, identity, capture) for shard in plan)


def completion_text(tokenizer: PreTrainedTokenizerFast, sample: Sample, stops: Sequence[int]) -> str:
    """The text of a completion as the grader sees it: `</think>` kept, the end token that stopped it left out."""
    ids = sample.completion_ids
    if sample.finish_reason == "stop" and ids and ids[-1] in stops:
        ids = ids[:-1]
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


@dataclass
class _Shard:
    name: str
    prompts: list[Prompt]


def _plan(candidate: Candidate, prompts: Sequence[Prompt], set_name: str, shard_prompts: int) -> list[_Shard]:
    starts = range(0, len(prompts), shard_prompts)
    name = f"{set_name}-{slug(candidate.name)}"
    return [_Shard(f"{name}-{i:05d}", list(prompts[start : start + shard_prompts])) for i, start in enumerate(starts)]


class _ShardMaker:
    """Samples, grades and writes shards from one stream of requests."""

    def __init__(self, tokenizer, grader, folder, run_seed, k, capture, info, devices):
        self.tokenizer, self.grader, self.folder = tokenizer, grader, folder
        self.run_seed, self.k, self.capture, self.info, self.devices = run_seed, k, capture, info, devices
        self.stops = stop_ids(tokenizer)
        self.since_s = time.monotonic()

    def run(self, shards: list[_Shard], sampler: Sampler, params: SamplingParams, bar: tqdm, writes: bool) -> None:
        home = {prompt.key: shard for shard in shards for prompt in shard.prompts}
        asked = [prompt for shard in shards for prompt in shard.prompts]
        requests = list(sample_requests(self.tokenizer, asked, self.k, self.run_seed))
        waiting = {(request.key, request.sample_index) for request in requests}
        drawn: dict[str, dict[tuple[str, int], Sample]] = {shard.name: {} for shard in shards}
        for sample in sampler.sample(requests, params, self.capture):
            cell = (sample.key, sample.sample_index)
            if cell not in waiting:
                raise DataError("the sampler returned a sample that was not asked for, or twice", value=cell)
            waiting.remove(cell)
            if sample.sample_index > 0:
                sample.dists = None  # agreement needs those of sample 0 only; the rest would fill the memory
            shard = home[sample.key]
            drawn[shard.name][cell] = sample
            bar.update()
            if len(drawn[shard.name]) == len(shard.prompts) * self.k:
                samples = drawn.pop(shard.name)
                if writes:
                    self._write(shard, samples)
        if waiting:
            raise DataError(
                f"the sampler ended without {len(waiting)} of {len(requests)} samples",
                value=min(waiting),
                remedy="Run again: finished shards are kept.",
            )

    def _write(self, shard: _Shard, drawn: dict[tuple[str, int], Sample]) -> None:
        samples = [[drawn[prompt.key, index] for index in range(self.k)] for prompt in shard.prompts]
        rows = self._rows(shard.prompts, samples)
        wall_s, self.since_s = time.monotonic() - self.since_s, time.monotonic()
        # The cache first: a shard counts as finished when both files are there.
        if self.capture is not None:
            dists = {f"{prompt.key}/0": drawn[prompt.key, 0].dists for prompt in shard.prompts}
            self.folder.write_shard(f"{shard.name}.cache", lambda p: self._write_cache(p, dists), self.info, wall_s=0.0)
        self.folder.write_shard(
            f"{shard.name}.parquet",
            lambda path: pq.write_table(pa.Table.from_pylist(rows, SCHEMA), path, compression="zstd"),
            self.info,
            wall_s=wall_s,
            device_s=wall_s * self.devices,
        )

    def _rows(self, prompts: list[Prompt], samples_PK: list[list[Sample]]) -> list[dict]:
        texts_PK = [[completion_text(self.tokenizer, s, self.stops) for s in samples] for samples in samples_PK]
        graded = iter(
            self.grader.grade(
                (prompt, text, sample.finish_reason)
                for prompt, samples, texts in zip(prompts, samples_PK, texts_PK)
                for sample, text in zip(samples, texts)
            )
        )
        rows = []
        for prompt, samples, texts in zip(prompts, samples_PK, texts_PK):
            judged = [next(graded) for _ in samples]
            rows.append(
                {
                    **prompt_row(prompt),
                    "prompt_ids": render_prompt(self.tokenizer, prompt.text),
                    "seed": [sample.seed for sample in samples],
                    "completion_ids": [list(sample.completion_ids) for sample in samples],
                    "generations": texts,
                    "finish_reasons": [sample.finish_reason for sample in samples],
                    "verdict": [Verdict(one.verdict).value for one in judged],
                    "extracted": [one.extracted for one in judged],
                    "detail": [one.detail for one in judged],
                }
            )
        return rows

    def _write_cache(self, path: Path, dists: dict) -> None:
        vocab_size = max(self.tokenizer.get_vocab().values()) + 1
        header = cache_header(self.tokenizer, self.info["fingerprint"], vocab_size, self.capture)
        with CacheWriter(path, header) as writer:
            for key, captured in dists.items():
                if captured is None:
                    raise DataError("the sampler captured no distributions", where=f"sample {key}")
                writer.append(key, captured)


def _bar(title: str, done: int, total: int, shown: bool) -> tqdm:
    # Into a file or a CI log a bar is a line each time: seldom there, smooth on a terminal.
    seldom = 0.2 if sys.stderr.isatty() else 15.0
    return tqdm(total=total, initial=done, desc=title, unit="sample", disable=not shown, mininterval=seldom)


def _check_prompts(prompts: Sequence[Prompt]) -> None:
    if not prompts:
        raise DataError(
            "there is no prompt to evaluate on", where="prompts.eval", remedy="Add a source to prompts.eval."
        )
    seen: set[str] = set()
    for prompt in prompts:
        if prompt.key in seen:
            raise DataError(
                "the same prompt comes twice", where="prompts.eval", value=prompt.text[:80], remedy="Remove duplicates."
            )
        seen.add(prompt.key)


def _identity(
    candidate: Candidate,
    prompts: Sequence[Prompt],
    params: SamplingParams,
    k: int,
    run_seed: int,
    capture: CaptureSpec | None,
    shard_prompts: int,
) -> str:
    """16 hex digits over everything a shard's samples depend on."""
    parts = [candidate.fingerprint, [p.key for p in prompts], params.__dict__, k, run_seed, shard_prompts]
    parts.append(capture and capture.__dict__)
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def _is_finished(folder: StageFolder, name: str, identity: str, capture: CaptureSpec | None) -> bool:
    if not folder.has_shard(f"{name}.parquet") or (capture and not folder.has_shard(f"{name}.cache")):
        return False
    shard = folder.check_shard(f"{name}.parquet")
    if shard.info.get("identity") != identity:
        raise StoreError(
            "the results were made from other prompts, sampling settings, seed or weights",
            where=str(shard.path),
            remedy="Pass --restart eval, or set another run.name.",
        )
    return True
