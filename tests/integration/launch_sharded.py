"""A teacher split over ranks, compared with the same teacher whole: `launch_sharded.py OUT --cases JSON`.

Starts under any launcher, on CPUs (gloo) or GPUs (NCCL):
    deepspeed --num_accelerators 2 tests/integration/launch_sharded.py OUT
    torchrun --nproc_per_node 2 tests/integration/launch_sharded.py OUT --dtypes bfloat16

A case is {path, tensor, expert, dtype, do}: what is done is a list of
    logits   every rank scores, prefills and decodes sequences of its own shape and number; the gaps to the whole model
             of transformers in float32 on this rank, and those of the whole model in the case's dtype
    samples  the ranks draw the completions of one list of requests, each its share
    paged    both again over pages (teachers.runner), as GPUs run them, on CPUs with the reference of the kernels
    kept     alone: the logits over pages of a checkpoint whose experts stay in FP8
    load     nothing but loading: bytes and memory

Every rank writes OUT/rank-R.json: for each case its results. Rank 0 also prints one line a case.
"""

import argparse
import ctypes
import gc
import json
import sys
import threading
import time
import weakref
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

sys.path.append(str(Path(__file__).parents[2]))  # a launcher starts this file from any folder

from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import AutoModelForCausalLM

from distill.checkpoints import check_checkpoint
from distill.dist import add_launcher_arguments, init_ranks
from distill.generate import Row
from distill.records import CaptureSpec, SampleRequest, SamplingParams
from distill.split import Split
from teachers import mesh
from teachers.engine import TeacherEngine
from teachers.paged import PagePool
from teachers.runner import Segment
from teachers.runners import runner_of
from teachers.sampler import PagedGenerator
from teachers.shard import Loaded, load
from teachers.slices import host_bytes

BUNDLED = Path(__file__).parents[2] / "teachers" / "tiny" / "teacher"
PARAMS = SamplingParams(temperature=0.8, top_p=0.95, top_k=0, max_new_tokens=24)
CAPTURE = CaptureSpec(k_max=8, tail_bound=1e-3)
DECODE_STEPS = 16
M_MMAP_THRESHOLD = -3


class PeakTensors(TorchDispatchMode):
    """The most bytes that tensors made under this mode held at once."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.seen: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if isinstance(tensor, torch.Tensor) and not tensor.is_meta:
                self._count(tensor.untyped_storage())
        return out

    def _count(self, storage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.seen:
            return
        self.seen.add(key)
        weakref.finalize(storage, self._freed, key, size)
        self.now += size
        self.peak = max(self.peak, self.now)

    def _freed(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.now -= size


@contextmanager
def peak_host_memory():
    """A list that gets the most anonymous memory of this process, looked at every 2 ms, above that before."""
    with suppress(OSError, AttributeError):  # glibc: what earlier cases freed must not serve this one,
        ctypes.CDLL(None).malloc_trim(0)
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 18)  # and what is freed here leaves the process at once
    found, done, before = [0], threading.Event(), host_bytes()

    def watch():
        while not done.is_set():
            found[0] = max(found[0], host_bytes() - before)
            time.sleep(0.002)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        done.set()
        thread.join()


def sequences(share: int, vocab: int) -> list[torch.Tensor]:
    """Token sequences: another number of them, of other lengths, for every share of the requests."""
    generator = torch.Generator().manual_seed(100 + share)
    lengths = [32 + 9 * (i + share) for i in range(5 + share)]
    return [torch.randint(0, vocab, (length,), generator=generator) for length in lengths]


@cache
def whole_logits(path: str, dtype: torch.dtype, share: int, vocab: int, device: torch.device) -> list[torch.Tensor]:
    """Logits of the share's sequences by the whole model, which is dropped again."""
    if "quantization_config" in check_checkpoint(path):  # transformers does not read it on every machine: ours does
        model = load(check_checkpoint(path), Path(path), dtype, device, Split()).model
    else:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).to(device).eval()
    with torch.inference_mode():
        return [model(ids[None].to(device)).logits[0, :, :vocab].float().cpu() for ids in sequences(share, vocab)]


def split_logits(engine: TeacherEngine, ids: list[torch.Tensor]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """(logits of every position in one pass, logits of the last DECODE_STEPS + 1 positions by prefill and decoding)."""
    model, lengths = engine._generator.model, torch.tensor([len(each) for each in ids], device=engine.model.device)
    padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True).to(engine.model.device)
    with model.session():
        hidden = model.hidden(padded)
        whole = [model.logits(row[:n]).cpu() for row, n in zip(hidden, lengths.tolist())]
    steps, rows = [], torch.arange(len(ids), device=engine.model.device)
    with model.session(slots=len(ids)):
        prompts = lengths - DECODE_STEPS
        steps.append(model.prefill(padded[:, : int(prompts.max())], prompts, rows, rows))
        for step in range(DECODE_STEPS):
            now = prompts + step
            steps.append(model.decode(padded[rows, now], now, int(now.max()) + 1))
    return whole, list(torch.stack(steps, 1).cpu())


def gap(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> dict:
    """Largest difference of a logit, and the Kullback-Leibler divergence of every position in nats."""
    pairs = list(zip(found, wanted, strict=True))
    q, p = (torch.cat([pair[i] for pair in pairs]).double().log_softmax(-1) for i in (0, 1))
    return {"logit": max((a - w).abs().max().item() for a, w in pairs), "kl": (p.exp() * (p - q)).sum(-1).tolist()}


def compare_logits(engine: TeacherEngine, case: dict, split: Split) -> dict:
    ids = sequences(split.share, engine.vocab_size)
    dtype, of = getattr(torch, case["dtype"]), (split.share, engine.vocab_size, engine.model.device)
    reference = whole_logits(case["path"], torch.float32, *of)
    over_pages = isinstance(engine._generator, PagedGenerator)  # what a GPU does
    whole, stepped = paged_logits(engine._generator.runner, ids) if over_pages else split_logits(engine, ids)
    tails = [each[-DECODE_STEPS - 1 :] for each in reference]
    found = {"pass": gap(whole, reference), "decode": gap(stepped, tails), "rows": len(ids)}
    if dtype != torch.float32:
        low = whole_logits(case["path"], dtype, *of)
        found["noise"] = gap(low, reference)
        found["noise_at_end"] = gap([each[-DECODE_STEPS - 1 :] for each in low], tails)
    return found


def requests(tokenizer, number: int = 8, samples: int = 2) -> list[SampleRequest]:
    encode = tokenizer.encode
    texts = [f"<|user|>What is {7 * i} + {i * i}?<|assistant|><think>\n" for i in range(number)]
    prompts = [tuple(encode(text, add_special_tokens=False)) for text in texts]
    return [SampleRequest(f"{i}", j, ids, 1000 * i + j) for i, ids in enumerate(prompts) for j in range(samples)]


def share_of(asked: list[SampleRequest], split: Split) -> list[SampleRequest]:
    """This rank's: the share of the last rank is empty, and the others differ in size."""
    bounds = [round(len(asked) * (i / max(1, split.shares - 1)) ** 2) for i in range(split.shares)]
    bounds = [*bounds, len(asked)] if split.shares > 1 else [0, len(asked)]
    return asked[bounds[split.share] : bounds[split.share + 1]]


def draw(engine: TeacherEngine | PagedGenerator, tokenizer, split: Split) -> dict:
    """This rank's samples, and how far their captured distributions are from scored ones."""
    mine = share_of(requests(tokenizer), split)
    prompt_of = {(request.key, request.sample_index): request.prompt_ids for request in mine}
    drawn = list(engine.sample(mine, PARAMS, CAPTURE))
    scored = engine.score([(prompt_of[s.key, s.sample_index], s.completion_ids) for s in drawn], CAPTURE)
    gaps = [abs(s.dists.logsumexp_T - each.logsumexp_T).max().item() for s, each in zip(drawn, scored, strict=True)]
    return {
        "samples": {f"{s.key}/{s.sample_index}": [s.completion_ids, s.finish_reason] for s in drawn},
        "captured_to_scored": max(gaps, default=0.0),
    }


def paged_logits(runner, ids: list[torch.Tensor]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """As split_logits: (of every position in one pass, of the last ones by a prefill of the rest and decode steps)."""
    lengths, device, over = [len(each) for each in ids], runner.device, runner.mesh

    def prefill(parts: list[torch.Tensor], *where) -> list[torch.Tensor]:
        sizes = [len(part) for part in parts]
        segments = [Segment(sum(sizes[:i]), size) for i, size in enumerate(sizes)]
        positions = torch.cat([torch.arange(size) for size in sizes])
        found = runner.prefill(torch.cat(parts).int().to(device), positions.int().to(device), segments, *where)
        return list(runner.logits(runner.finish(found)).cpu().split(sizes))

    whole = prefill(ids, None, None)
    prompts = [length - DECODE_STEPS for length in lengths]
    pool = PagePool(
        len(runner.layers), 200, runner.entry_size, dtype=runner.dtype, device=torch.device(device), page_tokens=16
    )
    pages = [pool.take(pool.pages_for(length)) for length in lengths]
    slots = np.concatenate([pool.slots(own, 0, prompt) for own, prompt in zip(pages, prompts)])
    heads = prefill([each[:n] for each, n in zip(ids, prompts)], pool, torch.from_numpy(slots).to(device))
    steps = [torch.stack([logits[-1] for logits in heads])]
    tables = torch.zeros(len(ids), max(map(len, pages)), dtype=torch.int32)
    for row, own in enumerate(pages):
        tables[row, : len(own)] = torch.tensor(own)
    active = torch.tensor([len(ids)], dtype=torch.int32, device=device)
    for step in range(DECODE_STEPS):
        if over and over.shares > 1:
            now = over.meet(rows=len(ids))
            assert not now.is_prefill
        at = torch.tensor([prompt + step for prompt in prompts], dtype=torch.int32)
        tokens = torch.stack([each[n] for each, n in zip(ids, at.tolist())]).int()
        if over and over.shares > 1 and device.type == "cuda":  # a recorded step has the same rows everywhere
            extra = now.most - len(ids)
            tokens, at = F.pad(tokens, (0, extra)), F.pad(at, (0, extra))
            now_tables = F.pad(tables, (0, 0, 0, extra))
        else:
            now_tables = tables
        logits = runner.decode(tokens.to(device), at.to(device), now_tables.to(device), active, pool)
        steps.append(logits[: len(ids)].cpu())
    return whole, list(torch.stack(steps, 1))


def compare_paged(engine: TeacherEngine, case: dict, split: Split) -> dict:
    """The gaps of the logits over pages; the samples, with a cache that is ample and with one that is not."""
    runner = runner_of(engine.model, engine.vocab_size, split)
    mesh.GATHERED_TOKENS = 100  # experts answer a pass in several stretches
    ids = sequences(split.share, engine.vocab_size)
    reference = whole_logits(case["path"], torch.float32, split.share, engine.vocab_size, engine.model.device)
    whole, stepped = paged_logits(runner, ids)
    tails = [each[-DECODE_STEPS - 1 :] for each in reference]
    found = {"pass": gap(whole, reference), "decode": gap(stepped, tails)}
    for name, tokens, page in (("samples", 4096, 16), ("tight", 72, 4)):
        paged = PagedGenerator(runner, 5, engine.stop_ids, cache_tokens=tokens, page_tokens=page)
        drawn = draw(paged, engine.tokenizer, split)
        found |= {name: drawn["samples"], f"{name}_captured_to_scored": drawn["captured_to_scored"]}
        found[f"{name}_preempted"] = paged.preempted
    found["turns"] = draw_in_turns(paged, engine.tokenizer, split)
    engine.loaded.groups += paged.let_go()
    return found


def compare_kept(case: dict, device: torch.device, split: Split) -> tuple[dict, Loaded]:
    """The gaps of logits computed from experts in FP8 to those of the whole model, widened; what was loaded."""
    config, dtype = check_checkpoint(case["path"]), getattr(torch, case["dtype"])
    loaded, vocab = load(config, Path(case["path"]), dtype, device, split, keep_fp8=True), config["vocab_size"]
    runner = runner_of(loaded.model, vocab, split)
    whole, stepped = paged_logits(runner, sequences(split.share, vocab))
    reference = whole_logits(case["path"], torch.float32, split.share, vocab, device)
    loaded.groups += runner.mesh.groups if runner.mesh else []
    return {
        "pass": gap(whole, reference),
        "decode": gap(stepped, [each[-DECODE_STEPS - 1 :] for each in reference]),
    }, loaded


def draw_in_turns(paged: PagedGenerator, tokenizer, split: Split) -> dict:
    """This rank's samples, drawn as a service does: a step, perhaps a score, then a wait for the others, again."""
    asked, drawn = share_of(requests(tokenizer), split), {}
    waiting = [Row(request, PARAMS, CAPTURE if request.sample_index else None) for request in asked]
    with paged.rows() as loop:
        turn = 0
        while not paged.runner.mesh.least(int(not waiting and not loop.active)):
            if waiting and loop.wants_rows:
                now, waiting = waiting[: loop.free], waiting[loop.free :]
                loop.admit(now)
            if loop.active:
                loop.step()
            for told in loop.news():
                drawn[f"{told.request.key}/{told.request.sample_index}"] = [told.token_ids, told.finish_reason]
            if turn % 5 == split.share:
                paged.score([((1, 2, 3), (4, 5))], CAPTURE)
            paged.finish()
            turn += 1
    return drawn


def run_case(case: dict, ranks) -> dict:
    split = Split(case["tensor"], case["expert"], ranks.rank, ranks.world)
    gc.collect()
    if case["do"] == ["load"]:
        config = check_checkpoint(case["path"])
        with peak_host_memory() as host, PeakTensors() as peak:
            loaded = load(config, Path(case["path"]), getattr(torch, case["dtype"]), ranks.device, split)
        report, found = loaded.report, {"peak_host_bytes": host[0]}
        closes = loaded
    elif case["do"] == ["kept"]:
        with PeakTensors() as peak:
            found, closes = compare_kept(case, ranks.device, split)
        report = closes.report
    else:
        with PeakTensors() as peak:
            engine = TeacherEngine(case["path"], dtype=case["dtype"], device=ranks.device, batch_size=5, split=split)
        report, found, closes = engine.loaded.report, {}, engine
        if "logits" in case["do"]:
            found |= compare_logits(engine, case, split)
        if "samples" in case["do"]:
            found |= draw(engine, engine.tokenizer, split)
        if "paged" in case["do"]:
            found["paged"] = compare_paged(engine, case, split)
    closes.close()
    return found | {"report": vars(report), "peak_tensor_bytes": peak.peak}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--cases", type=json.loads, help="a list; default: the matrix for the number of ranks")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], help="of the default matrix")
    parser.add_argument("--device", default="auto")
    add_launcher_arguments(parser)
    args = parser.parse_args()
    torch.set_num_threads(1)
    ranks = init_ranks(args.device, timeout_s=300)
    ways = [n for n in (1, 2, 4) if ranks.world % n == 0]
    default = [
        {"path": str(BUNDLED), "tensor": tp, "expert": ep, "dtype": dtype, "do": ["logits", "samples"]}
        for dtype in args.dtypes
        for tp in ways
        for ep in ways
        if max(tp, ep) > 1
    ]
    results = []
    for case in args.cases or default:
        since_s = time.monotonic()
        found = run_case(case, ranks)
        results.append(found)
        numbers = {
            key: f"{value['logit']:.1e} logit, {sum(value['kl']) / len(value['kl']):.1e} KL"
            if isinstance(value, dict)
            else value
            for key, value in found.items()
            if key not in ("samples", "report", "paged")
        }
        if paged := found.get("paged"):
            numbers["paged"] = [f"{paged[name]['logit']:.1e}" for name in ("pass", "decode")]
        ranks.print(json.dumps({k: v for k, v in case.items() if k != "path"}), json.dumps(numbers), end=" ")
        ranks.print(f"{time.monotonic() - since_s:.1f} s")
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / f"rank-{ranks.rank}.json").write_text(json.dumps({"cases": args.cases or default, "results": results}))
    ranks.barrier()
    ranks.close()


if __name__ == "__main__":
    main()
