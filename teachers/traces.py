"""The traces stage: prompts -> graded traces, with the teacher's distributions captured in the same pass.

One shard of prompts is sampled, graded and written before the next begins, so that a killed run repeats at most one
shard a rank. The logits shard is written first: a trace shard never exists without its distributions.
"""

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from distill import traceset
from distill.config import Config
from distill.dist import Ranks
from distill.errors import DataError
from distill.grade import Grader
from distill.logit_cache import CacheWriter, cache_header
from distill.records import CaptureSpec, Prompt, Sample, SamplingParams, Trace
from distill.split import Split
from distill.store import StageFolder
from distill.tokens import render_prompt, sample_requests
from teachers.engine import TeacherEngine


@dataclass
class TracesStage:
    """Everything one rank needs to sample its share of the prompts."""

    config: Config
    traces: StageFolder
    logits: StageFolder
    ranks: Ranks
    load_teacher: Callable[[], TeacherEngine]  # called only when something is missing
    split: Split  # who holds the teacher, and who works on which share

    def run(self, prompts: list[Prompt]) -> None:
        """Sample every missing shard of this rank's share; returns when it is complete."""
        size = self.config.traces.shard_prompts
        shards = {f"traces-{i // size:05d}": prompts[i : i + size] for i in range(0, len(prompts), size)}
        missing = self.ranks.on_main(lambda: [name for name in shards if not self._complete(name)])
        turns = self.split.turns(missing)
        if not turns:
            return
        engine = self.load_teacher()
        total, todo = (
            sum(len(shards[name]) for name in names) * self.config.teacher.sampling.n // self.split.shares
            for names in (shards, missing)
        )
        with (
            Grader() as grader,
            tqdm(total=total, initial=total - todo, desc="traces", unit="trace", disable=not self.ranks.is_main) as bar,
        ):
            for name in turns:
                self._make_shard(name, shards.get(name, []), engine, grader, bar)

    def _complete(self, name: str) -> bool:
        return self.traces.has_shard(f"{name}.parquet") and (
            self.config.teacher.capture is None or self.logits.has_shard(f"{name}.cache")
        )

    def _make_shard(
        self, name: str | None, prompts: list[Prompt], engine: TeacherEngine, grader: Grader, bar: tqdm
    ) -> None:
        started_s, sampling = time.monotonic(), self.config.teacher.sampling
        params = SamplingParams(sampling.temperature, sampling.top_p, sampling.top_k, sampling.max_new_tokens)
        capture = self.config.teacher.capture
        capture = capture and CaptureSpec(capture.k_max, capture.tail_bound, capture.tail_draws)
        wanted = sample_requests(engine.tokenizer, prompts, sampling.n, self.config.run.seed)
        samples: dict[tuple[str, int], Sample] = {}
        for sample in engine.sample(wanted, params, capture):
            samples[sample.key, sample.sample_index] = sample
            bar.update()
        if name is None or self.split.tensor_rank > 0:
            return  # the first of a tensor-parallel group has the same samples, and writes them
        if capture:
            write = lambda path: write_logits(path, samples, engine, capture)  # noqa: E731
            self.logits.write_shard(f"{name}.cache", write, {"samples": len(samples)}, wall_s=0.0)  # the traces' pass
        traces = self._graded(prompts, samples, engine, grader)
        tokens = sum(len(s.completion_ids) for s in samples.values())
        wall_s = time.monotonic() - started_s
        self.traces.write_shard(
            f"{name}.parquet",
            lambda path: traceset.write_traces(path, traces),
            {"prompts": len(prompts), "samples": len(samples), "tokens": tokens},
            wall_s=wall_s,
            device_s=wall_s * self.split.tensor_parallel,
        )

    def _graded(
        self, prompts: list[Prompt], samples: dict[tuple[str, int], Sample], engine: TeacherEngine, grader: Grader
    ) -> list[Trace]:
        ordered = [(p, samples[p.key, i]) for p in prompts for i in range(self.config.teacher.sampling.n)]
        texts = [engine.decode(sample.completion_ids) for _, sample in ordered]
        graded = grader.grade([(p, text, s.finish_reason) for (p, s), text in zip(ordered, texts)])
        traces = [
            Trace(
                prompt=prompt,
                sample_index=sample.sample_index,
                seed=sample.seed,
                prompt_ids=render_prompt(engine.tokenizer, prompt.text),
                completion_ids=sample.completion_ids,
                text=text,
                finish_reason=sample.finish_reason,
                verdict=result.verdict,
                keep=False,
            )
            for (prompt, sample), text, result in zip(ordered, texts, graded)
        ]
        return traceset.decide(traces, self.config.traces.verify, self.config.traces.max_per_prompt)


def write_logits(path: Path, samples: dict[tuple[str, int], Sample], engine: TeacherEngine, capture: CaptureSpec):
    """One cache file of all samples of a shard, in sample order."""
    header = cache_header(engine.tokenizer, engine.fingerprint, engine.vocab_size, capture)
    with CacheWriter(path, header) as writer:
        for (key, index), sample in sorted(samples.items()):
            writer.append(f"{key}/{index}", sample.dists)


def summary(traces: list[Trace]) -> dict:
    """Counts for the manifest; an error when nothing survived, since no student can be trained on it."""
    dropped = Counter(t.drop_reason for t in traces if not t.keep)
    kept = [t for t in traces if t.keep]
    if not kept:
        raise DataError(
            f"no trace survived: {len(traces)} sampled, dropped by reason {dict(dropped)}",
            where="traces",
            remedy="Raise teacher.sampling.max_new_tokens if most were truncated, teacher.sampling.n or the number of "
            "prompts if most were wrong, or set traces.verify: false to train on unverified traces.",
        )
    return {
        "samples": len(traces),
        "kept": len(kept),
        "dropped": dict(dropped),
        "tokens": sum(len(t.completion_ids) for t in traces),
        "kept_tokens": sum(len(t.completion_ids) for t in kept),
        "prompts_with_a_kept_trace": len({t.prompt.key for t in kept}),
    }
