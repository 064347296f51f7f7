"""Dense models over pages: transformers' logits in every family, and the samples of the loop over slots."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from paged_laws import check_prefill_in_chunks_and_decode, pool_of, reference
from sampling_models import STOPS, VOCAB, as_table, deepseek, generator, llama, qwen2, qwen3, requests

from distill.generate import Row
from distill.records import CaptureSpec, SampleRequest, SamplingParams
from distill.tokens import render_prompt
from students.model import load_student
from students.rollout import Rollout
from teachers.dense import DenseRunner, unsupported
from teachers.paged import PagePool
from teachers.runner import Runner, Segment
from teachers.runners import paged_loop, runner_of
from teachers.sampler import PagedGenerator

torch.set_num_threads(1)
BUNDLED = Path(__file__).parents[3] / "teachers" / "tiny"
PARAMS, SPEC = SamplingParams(1.5, 0.98, 0, 24), CaptureSpec(16, 1e-2)
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
MODELS = {
    "qwen2": (qwen2, {}),
    "qwen2-tied-seven-a-group": (
        qwen2,
        {"num_attention_heads": 14, "num_key_value_heads": 2, "tie_word_embeddings": True},
    ),
    "qwen2-yarn": (qwen2, {"rope_parameters": YARN}),
    "qwen3-tied": (qwen3, {}),
    "qwen3-biases": (qwen3, {"attention_bias": True, "tie_word_embeddings": False}),
    "qwen3-one-key-head": (qwen3, {"num_key_value_heads": 1}),
    "llama": (llama, {}),
    "llama3-tied": (llama, {"rope_parameters": LLAMA3, "tie_word_embeddings": True}),
    "llama-biases": (llama, {"attention_bias": True, "mlp_bias": True}),
    "llama-head-each": (llama, {"num_key_value_heads": 4, "head_dim": 48}),
}


def build(name: str):
    """The model; biases and norms are random too, so that leaving one out shows."""
    make, changes = MODELS[name]
    model, generator = make(**changes), torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        if parameter.dim() == 1 and parameter is not model.model.norm.weight:
            parameter.data.add_(torch.randn(parameter.shape, generator=generator), alpha=0.3)
    return model


@pytest.mark.parametrize("name", MODELS)
def test_prefill_in_chunks_and_decode_equal_the_whole_forward(name):
    check_prefill_in_chunks_and_decode(build(name), DenseRunner)


def test_ragged_sequences_and_their_pasts_do_not_see_each_other():
    model, rng = build("qwen2"), np.random.default_rng(1)
    runner = DenseRunner(model)
    lengths, pasts = [1, 7, 7, 30, 30, 12], [0, 0, 9, 0, 9, 30]
    sequences = [torch.from_numpy(rng.integers(0, VOCAB, new + past)) for new, past in zip(lengths, pasts)]
    pool = pool_of(runner, 60, 4)
    pool.states.normal_()
    slots = [torch.from_numpy(pool.slots(pool.take(pool.pages_for(len(s))), 0, len(s))) for s in sequences]
    for ids_T, mine, past in zip(sequences, slots, pasts):
        if past:
            runner.prefill(ids_T[:past], torch.arange(past), [Segment(0, past)], pool, mine[:past])
    starts = np.cumsum([0, *lengths[:-1]]).tolist()
    segments = [
        Segment(start, length, mine[:past] if past else None)
        for start, length, mine, past in zip(starts, lengths, slots, pasts)
    ]
    new = lambda parts: torch.cat([part[past:] for part, past in zip(parts, pasts)])  # noqa: E731
    positions = new([torch.arange(len(ids_T)) for ids_T in sequences])
    for to in (new(slots), torch.zeros(sum(lengths), dtype=torch.int64)):  # kept, or not: all in page 0
        parts = runner.prefill(new(sequences), positions, segments, pool, to)
        for logits_TV, ids_T, past in zip(runner.logits(runner.finish(parts)).split(lengths), sequences, pasts):
            assert (logits_TV - reference(model, ids_T)[past:]).abs().max() < 1e-4


def test_rows_that_only_fill_up_a_batch_change_nothing_but_page_0():
    runner = DenseRunner(build("llama"))
    pool = pool_of(runner, 4, 8)
    pool.states.normal_()
    before = pool.states.clone()
    one = lambda *values: torch.tensor(values, dtype=torch.int32)  # noqa: E731
    tables = torch.tensor([[1], [2]], dtype=torch.int32)
    alone = runner.decode(one(5), one(3), tables[:1], one(1), pool)
    pool.states.copy_(before)
    both = runner.decode(one(5, 6), one(3, 0), tables, one(1), pool)
    assert torch.allclose(both[0], alone[0], atol=1e-4)
    assert torch.equal(pool.states[:, 2:], before[:, 2:])
    changed = (pool.states[:, 1] != before[:, 1]).any(-1)
    assert changed.nonzero()[:, 1].tolist() == [3, 3, 3]  # one place in each of three layers


@pytest.mark.parametrize("name", ["qwen2-tied-seven-a-group", "qwen3-tied", "llama3-tied"])
def test_samples_are_those_of_the_loop_over_slots_whatever_the_rows_pages_and_preemption(name):
    model, asked = build(name), requests(8, 3)
    wanted = {(s.key, s.sample_index): s for s in generator(model, 7).sample(asked, PARAMS, SPEC)}
    assert len({tuple(s.completion_ids) for s in wanted.values()}) > 20  # draws, not one answer
    runner = DenseRunner(model)
    for slots, cache, page in ((24, None, 16), (7, None, 64), (12, 200, 8), (5, 70, 4)):
        paged = PagedGenerator(runner, slots, STOPS, cache_tokens=cache, page_tokens=page)
        found = list(paged.sample(asked, PARAMS, SPEC))
        assert as_table(found) == as_table(wanted.values())
        assert (paged.preempted > 0) == (cache is not None)
        assert paged.pool.free == paged.pool.capacity
        for sample in found:
            dists, expected = sample.dists, wanted[sample.key, sample.sample_index].dists
            assert np.array_equal(dists.ids_S, expected.ids_S)
            assert np.allclose(dists.logprobs_S, expected.logprobs_S, atol=1e-4)
            assert np.allclose(dists.logsumexp_T, expected.logsumexp_T, atol=1e-4)


def test_prompts_prefilled_in_chunks_beside_others_give_the_same_samples(monkeypatch):
    model, asked = build("qwen2"), requests(9, 2, seed=4)
    wanted = as_table(generator(model, 6).sample(asked, PARAMS))
    passes, runner = [], DenseRunner(model)
    prefill = runner.prefill
    runner.prefill = lambda ids_T, positions_T, segments, *rest: (
        passes.append([(one.count, one.past) for one in segments]) or prefill(ids_T, positions_T, segments, *rest)
    )
    monkeypatch.setattr("teachers.scheduler.PREFILL_TOKENS", 11)
    for tokens, page in ((None, 4), (130, 8)):
        paged = PagedGenerator(runner, 6, STOPS, cache_tokens=tokens, page_tokens=page)
        assert as_table(paged.sample(asked, PARAMS)) == wanted
    together = [segments for segments in passes if len({past for _, past in segments}) > 1]
    assert together and max(count for segments in passes for count, _ in segments) <= 11


def test_samples_of_one_prompt_hold_its_full_pages_together():
    ids = tuple(range(40, 61))  # 5 full pages of 4 and one token
    asked = [type(r)(r.key, i, ids, r.seed) for i, r in enumerate(requests(1, 6))]
    paged = PagedGenerator(DenseRunner(build("qwen2")), 6, [], cache_tokens=400, page_tokens=4)
    with paged.rows() as loop:
        loop.admit([Row(request, PARAMS, None) for request in asked])
        loop.step()
        assert loop.pool.capacity - loop.pool.free == 5 + 6  # 5 shared, and each row's own last page
        assert int(loop.pool.holders.max()) == 6


def test_scores_are_those_of_the_loop_over_slots(monkeypatch):
    model = build("qwen3-biases")
    pairs = [(tuple(range(20, 30)), tuple(range(40, 40 + n))) for n in (1, 30, 7, 0, 30)]
    shared = tuple(range(100, 150))
    pairs += [((*shared, 7, i), tuple(range(60, 60 + 9 * i))) for i in range(3)]  # computed once for all three
    wanted = generator(model, 2).score(pairs, SPEC)
    monkeypatch.setattr("teachers.scoring.SCORE_TOKENS", 45)
    paged = PagedGenerator(DenseRunner(model), 2, STOPS)
    found = paged.score(pairs, SPEC)
    assert paged.scorer.shared_tokens == 2 * 51
    for mine, expected in zip(found, wanted, strict=True):
        assert np.array_equal(mine.ids_S, expected.ids_S) and np.array_equal(mine.offsets_T1, expected.offsets_T1)
        assert np.allclose(mine.logprobs_S, expected.logprobs_S, atol=1e-4)
        assert np.allclose(mine.tail_T, expected.tail_T, atol=1e-5)


def test_what_cannot_run_here_is_said():
    def reason(make=llama, **changes):
        return unsupported(make(**changes).config)

    assert reason() is None and reason(qwen2) is None and reason(qwen3) is None
    assert "dynamic" in reason(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0})
    assert "head_dim 20" in reason(head_dim=20) and reason(head_dim=24) is None
    assert "gelu" in reason(hidden_act="gelu")
    windows = {"use_sliding_window": True, "max_window_layers": 1, "sliding_window": 8}
    assert "sliding_attention" in reason(qwen2, **windows)


def bundled(name: str):
    """(model, tokenizer, requests, how to draw) of a bundled student."""
    model, tokenizer = load_student(str(BUNDLED / name), torch.float32, packed=False)
    prompts = [tuple(render_prompt(tokenizer, f"What is {i} plus {i}?")) for i in range(6)]
    asked = [SampleRequest(str(i), j, ids, 10 * i + j) for i, ids in enumerate(prompts) for j in range(4)]
    return model, tokenizer, asked, SamplingParams(1.0, 1.0, 0, 24)


@pytest.mark.parametrize("name", ["student-qwen", "student-llama"])
def test_a_bundled_student_answers_the_same_over_pages_and_as_its_weights_are_now(name):
    model, tokenizer, asked, params = bundled(name)
    faster = lambda model, ids, rows, stops: PagedGenerator(DenseRunner(model, ids), rows, stops, page_tokens=8)  # noqa: E731
    over_pages, over_slots = (Rollout(model, tokenizer, "cpu", 8, **how) for how in ({"faster": faster}, {}))
    before = as_table(over_pages.sample(asked, params))
    assert before == as_table(over_slots.sample(asked, params)) and len(before) == 24
    over_pages.release()
    assert as_table(over_pages.sample(asked, params)) == before
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + 0.1 * torch.randn_like(parameter))
    after = as_table(over_pages.sample(asked, params))
    assert after == as_table(over_slots.sample(asked, params)) and after != before


def test_each_family_gets_its_runner_and_a_cpu_the_loop_over_slots():
    for make, kind in ((deepseek, Runner), (llama, DenseRunner), (qwen2, DenseRunner), (qwen3, DenseRunner)):
        model = make(**({"qk_rope_head_dim": 16} if make is deepseek else {}))
        assert type(runner_of(model, 600)) is kind and runner_of(model, 600).vocab_size == 600
        assert paged_loop(model, 600, 8, STOPS) is None
    assert runner_of(llama(head_dim=20), 600) is None


@pytest.mark.slow
def test_two_ranks_with_half_the_heads_say_what_the_whole_model_says(tmp_path):
    names = ["qwen2", "qwen3-biases", "llama3-tied", "llama-biases", "llama-head-each"]
    for name in names:
        build(name).save_pretrained(tmp_path / name)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [str(Path(__file__).with_name("launch_dense.py")), *(str(tmp_path / name) for name in names)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"folder"')]
    assert done.returncode == 0 and [each["folder"] for each in found] == names, done.stderr
    assert all(max(each["gaps"]) < 1e-4 for each in found), found


@pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton")
def test_the_kernels_interpreted_equal_float64():
    file = Path(__file__).with_name("test_kernels_dense.py")
    some = ["-k", "sizes1 and not ragged and not 64", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", str(file), *some]
    done = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0 and "4 passed" in done.stdout, done.stdout + done.stderr


@pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton")
@pytest.mark.parametrize("capability", [80, 90])
def test_the_kernels_compile_for_a_gpu_that_is_not_here(capability):
    """What an interpreter lets pass, a compiler may not: a variable that changes its shape in a loop."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from teachers.kernels import gqa

    def compiled(kernel, types: dict, **constants):
        types = {name: "constexpr" if name in constants else types[name] for name in kernel.arg_names}
        source = ASTSource(kernel, types, constexprs=constants)
        return compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 4})

    half, whole, real = "*bf16", "*i32", "*fp32"
    types = {"query": half, "pool": half, "tables": whole, "lengths": whole, "sums": real, "scale": "fp32"}
    types |= dict.fromkeys(("query_stride", "table_stride", "SPLITS"), "i32")
    sizes = {"K": 2, "G": 3, "PAGE": 64, "BLOCK_G": 16, "STAGES": 3, "PRECISION": "tf32"}
    for direct, size, tokens in ((True, 48, 32), (False, 128, 64)):
        padded = {"D": size, "D2": 1 << (size - 1).bit_length(), "BLOCK_N": tokens}
        of = types | {"mixed": half if direct else real}
        assert compiled(gqa._attend, of, **sizes, **padded, DIRECT=direct).asm["cubin"]
    types = {"heads": half, "norms": half, "pool": half, "positions": whole, "slots": "*i64"}
    types |= {"cos_table": real, "sin_table": real, "eps": "fp32", "stride": "i32"}
    sizes = {"H": 6, "K": 2, "D": 48, "HALF2": 32, "HAS_NORMS": True, "HAS_POOL": True, "BLOCK_H": 8}
    assert compiled(gqa._rotate_heads, types, **sizes).asm["cubin"]


@pytest.mark.gpu
@pytest.mark.parametrize("name", MODELS)
def test_on_a_gpu_in_fp32_samples_equal_those_of_the_cpu(name):
    asked, params = requests(12, 3), SamplingParams(0.9, 0.95, 0, 40)
    model = build(name)
    wanted = {(s.key, s.sample_index): s for s in generator(model, 7).sample(asked, params, SPEC)}
    runner = DenseRunner(model.to("cuda"))
    for slots, tokens in ((36, 36 * 128), (7, 800)):  # the second preempts
        paged = PagedGenerator(runner, slots, STOPS, cache_tokens=tokens, page_tokens=16)
        found = {(s.key, s.sample_index): s for s in paged.sample(asked, params, SPEC)}
        same = [cell for cell in wanted if found[cell].completion_ids == wanted[cell].completion_ids]
        assert found.keys() == wanted.keys() and len(same) >= len(asked) - 2  # rounding may turn a close draw
        for cell in same:
            assert np.allclose(found[cell].dists.logsumexp_T, wanted[cell].dists.logsumexp_T, atol=1e-2)
            assert found[cell].finish_reason == wanted[cell].finish_reason


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["student-qwen", "student-llama"])
def test_on_a_gpu_a_bundled_student_answers_as_on_a_cpu_and_its_model_still_runs(name):
    model, tokenizer, asked, params = bundled(name)
    ids_T = torch.tensor(asked[0].prompt_ids)
    expected, wanted_TV = as_table(Rollout(model, tokenizer, "cpu", 8).sample(asked, params)), reference(model, ids_T)
    rollout = Rollout(model, tokenizer, "cuda", 8, faster=paged_loop)
    assert isinstance(rollout._generator, PagedGenerator)
    for _ in range(2):
        found = as_table(rollout.sample(asked, params))
        assert sum(found[cell] == expected[cell] for cell in expected) >= len(asked) - 2  # rounding: a close draw
        rollout.release()
    assert (reference(model, ids_T.cuda()).cpu() - wanted_TV).abs().max() < 1e-2


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["qwen2", "qwen3-tied", "llama3-tied"])
def test_on_a_gpu_bfloat16_is_as_close_to_fp32_as_transformers_is(name):
    model = build(name)
    model.model.norm.weight.data.fill_(1.0)
    ids_T = torch.randint(0, VOCAB, (200,), generator=torch.Generator().manual_seed(3))
    exact_TV = reference(model, ids_T)
    half = model.to("cuda", torch.bfloat16)
    half.model.rotary_emb = type(half.model.rotary_emb)(half.config).to("cuda")  # frequencies stay fp32, as when loaded
    theirs_TV = reference(half, ids_T.cuda()).float().cpu()
    runner = DenseRunner(half)
    pool = PagePool(3, 30, runner.entry_size, dtype=torch.bfloat16, device=runner.device, page_tokens=16)
    pages, ours = pool.take(13), []
    slots_T = torch.from_numpy(pool.slots(pages, 0, 200)).cuda()
    for start, stop in ((0, 90), (90, 180)):
        segment = Segment(0, stop - start, slots_T[:start] if start else None)
        positions = torch.arange(start, stop).cuda()
        parts = runner.prefill(ids_T[start:stop].cuda(), positions, [segment], pool, slots_T[start:stop])
        ours.append(runner.logits(runner.finish(parts)))
    tables = torch.tensor([pages], dtype=torch.int32).cuda()
    for length in range(180, 200):
        place = torch.tensor([length], dtype=torch.int32).cuda()
        ours.append(runner.decode(ids_T[length : length + 1].cuda(), place, tables, runner.everyone, pool))
    gap, theirs = (each.sub(exact_TV).norm(dim=1) for each in (torch.cat(ours).cpu(), theirs_TV))
    assert gap.mean() < 1.2 * theirs.mean() < 0.12 * exact_TV.norm(dim=1).mean()
    assert gap[180:].mean() < 1.3 * theirs[180:].mean()
