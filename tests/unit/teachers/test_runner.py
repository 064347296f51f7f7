"""The paged forward pass gives transformers' logits, and the paged loop the samples of the loop over slots."""

from pathlib import Path

import numpy as np
import pytest
import torch
from paged_laws import check_prefill_in_chunks_and_decode, reference
from sampling_models import STOPS, VOCAB, YARN, as_table, deepseek, generator, requests

from distill.records import CaptureSpec, SamplingParams
from teachers.paged import PagePool
from teachers.runner import Runner, Segment, unsupported
from teachers.sampler import PagedGenerator

torch.set_num_threads(1)
BUNDLED = Path(__file__).parents[3] / "teachers" / "tiny" / "teacher"
PARAMS, SPEC = SamplingParams(0.9, 0.95, 0, 24), CaptureSpec(16, 1e-2)
WIDE = {"qk_rope_head_dim": 16, "kv_lora_rank": 32, "v_head_dim": 16, "qk_nope_head_dim": 16}  # sizes of a GPU's tiles
MODELS = {
    "plain": {},
    "full-rank-query": {"q_lora_rank": None},
    "split-rotary": {"rope_interleave": False},
    "biases": {"attention_bias": True},
    "yarn": {"rope_parameters": YARN},
    "all-groups": {"n_group": 1, "topk_group": 1},
}


@pytest.mark.parametrize("name", MODELS)
def test_prefill_in_chunks_and_decode_equal_the_whole_forward(name):
    check_prefill_in_chunks_and_decode(deepseek(**MODELS[name]), Runner)


def test_ragged_sequences_do_not_see_each_other():
    model, rng = deepseek(), np.random.default_rng(1)
    runner, lengths = Runner(model), [7, 30, 30, 1, 7]
    sequences = [torch.from_numpy(rng.integers(0, VOCAB, length)) for length in lengths]
    starts = np.cumsum([0, *lengths[:-1]]).tolist()
    segments = [Segment(start, length) for start, length in zip(starts, lengths)]
    positions = torch.cat([torch.arange(length) for length in lengths])
    parts = runner.prefill(torch.cat(sequences), positions, segments, None, None)
    found = runner.logits(runner.finish(parts)).split(lengths)
    for logits_TV, ids_T in zip(found, sequences):
        assert (logits_TV - reference(model, ids_T)).abs().max() < 1e-4


def test_rows_that_only_fill_up_a_batch_change_nothing_but_page_0():
    model = deepseek()
    runner = Runner(model)
    pool = PagePool(3, 4, runner.latent_size, dtype=torch.float32, device=runner.device, page_tokens=8)
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


def test_the_bundled_teacher_draws_and_captures_what_it_draws_over_slots():
    from teachers.engine import TeacherEngine

    engine = TeacherEngine(BUNDLED, batch_size=8)
    runner = Runner(engine.model, engine.vocab_size)
    ids_T = torch.randint(0, 1600, (40,), generator=torch.Generator().manual_seed(0))
    parts = runner.prefill(ids_T, torch.arange(40), [Segment(0, 40)], None, None)
    wanted_TV = reference(engine.model, ids_T)[:, : engine.vocab_size]
    assert (runner.logits(runner.finish(parts)) - wanted_TV).abs().max() < 1e-4

    asked = requests(4, 3)
    over_slots = {(s.key, s.sample_index): s for s in engine.sample(asked, PARAMS, SPEC)}
    paged = PagedGenerator(runner, 8, engine.stop_ids, page_tokens=16)
    for sample in paged.sample(asked, PARAMS, SPEC):
        wanted = over_slots.pop((sample.key, sample.sample_index))
        assert sample.completion_ids == wanted.completion_ids and sample.finish_reason == wanted.finish_reason
        assert np.allclose(sample.dists.logsumexp_T, wanted.dists.logsumexp_T, atol=1e-4)
        assert np.array_equal(sample.dists.ids_S, wanted.dists.ids_S)
        assert np.allclose(sample.dists.logprobs_S, wanted.dists.logprobs_S, atol=1e-4)
    assert not over_slots


def test_scores_are_those_of_the_loop_over_slots(monkeypatch):
    model = deepseek()
    pairs = [(tuple(range(20, 30)), tuple(range(40, 40 + n))) for n in (1, 30, 7, 0, 30)]
    wanted = generator(model, 2).score(pairs, SPEC)
    paged = PagedGenerator(Runner(model), 2, STOPS)
    monkeypatch.setattr("teachers.scoring.SCORE_TOKENS", 45)
    monkeypatch.setattr("teachers.scoring.SCORE_LOGITS_CPU", 4 * VOCAB)
    for found, expected in zip(paged.score(pairs, SPEC), wanted, strict=True):
        assert np.array_equal(found.ids_S, expected.ids_S) and np.array_equal(found.offsets_T1, expected.offsets_T1)
        assert np.allclose(found.logprobs_S, expected.logprobs_S, atol=1e-4)
        assert np.allclose(found.tail_T, expected.tail_T, atol=1e-5)


def test_what_cannot_run_here_is_said():
    config = deepseek(**WIDE).config
    assert unsupported(config) is None
    config.rope_parameters = {"rope_type": "dynamic", "factor": 2.0}
    assert "dynamic" in unsupported(config)
    for change in ({"kv_lora_rank": 48}, {"qk_rope_head_dim": 8}):
        assert "powers of two" in unsupported(deepseek(**WIDE | change).config)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["plain", "full-rank-query", "yarn", "all-groups"])
def test_on_a_gpu_in_fp32_samples_equal_those_of_the_cpu(name):
    asked = requests(12, 3)
    params, greedy = SamplingParams(0.9, 0.95, 0, 40), SamplingParams(0.0, 1.0, 0, 40)
    model = deepseek(**WIDE, **MODELS[name])
    wanted = {params: generator(model, 7).sample(asked, params, SPEC) for params in (params, greedy)}
    wanted = {params: {(s.key, s.sample_index): s for s in samples} for params, samples in wanted.items()}
    runner = Runner(model.to("cuda"))
    for slots, tokens in ((36, None), (7, 800)):  # the second preempts
        paged = PagedGenerator(runner, slots, STOPS, cache_tokens=tokens or 36 * 128, page_tokens=16)
        for params, expected in wanted.items():
            found = {(s.key, s.sample_index): s for s in paged.sample(asked, params, SPEC)}
            same = sum(found[cell].completion_ids == expected[cell].completion_ids for cell in expected)
            assert found.keys() == expected.keys() and same >= len(asked) - 2  # rounding may turn a close draw
            for cell, sample in found.items():
                if sample.completion_ids == expected[cell].completion_ids:
                    assert np.allclose(sample.dists.logsumexp_T, expected[cell].dists.logsumexp_T, atol=1e-2)
                    assert sample.finish_reason == expected[cell].finish_reason


@pytest.mark.gpu
def test_on_a_gpu_bfloat16_is_as_close_to_fp32_as_transformers_is():
    model = deepseek(**WIDE, n_group=1, topk_group=1)
    model.model.norm.weight.data.fill_(1.0)
    ids_T = torch.randint(0, VOCAB, (200,), generator=torch.Generator().manual_seed(3))
    exact = reference(model, ids_T)
    half = model.to("cuda", torch.bfloat16)
    half.model.rotary_emb = type(half.model.rotary_emb)(half.config).to("cuda")  # frequencies stay fp32, as when loaded
    theirs = reference(half, ids_T.cuda()).float().cpu()
    runner = Runner(half)
    parts = runner.prefill(ids_T.cuda(), torch.arange(200).cuda(), [Segment(0, 200)], None, None)
    ours = runner.logits(runner.finish(parts)).cpu()
    # Of most tokens: where rounding turns a close choice of experts, a token differs by far more, in either.
    ours, theirs = ((logits - exact).norm(dim=1).median() for logits in (ours, theirs))
    assert ours < 1.2 * theirs and theirs < 0.1 * exact.norm(dim=1).median()


def test_samples_do_not_depend_on_rows_pages_sharing_or_preemption():
    model, asked = deepseek(), requests(12, 3)
    wanted = as_table(generator(model, 7).sample(asked, PARAMS))
    runner = Runner(model)
    for slots, cache, page in ((36, None, 16), (7, None, 64), (12, 200, 8), (5, 70, 4)):
        paged = PagedGenerator(runner, slots, STOPS, cache_tokens=cache, page_tokens=page)
        assert as_table(paged.sample(asked, PARAMS)) == wanted
        assert (paged.preempted > 0) == (cache is not None)
        assert paged.pool.free == paged.pool.capacity
