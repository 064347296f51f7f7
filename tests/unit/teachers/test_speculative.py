"""Speculative decoding draws what decoding without it draws; the module is transformers' own arithmetic."""

import numpy as np
import pytest
import torch
from fp8_checkpoint import quantised_copy
from mtp_models import WIDE, add_to, module, spread
from sampling_models import STOPS, VOCAB, deepseek, requests
from test_engine import asked, saved
from transformers.modeling_layers import MtpModel

from distill.errors import ModelError
from distill.generate import Row
from distill.records import CaptureSpec, SampleRequest, SamplingParams
from distill.sampling import StepLogits, draw, uniform
from distill.split import Split
from teachers.engine import TeacherEngine
from teachers.mtp import MtpRunner
from teachers.runner import Runner
from teachers.sampler import PagedGenerator
from teachers.service_metrics import COUNTS, Metrics
from teachers.speculative import SpeculativeGenerator

torch.set_num_threads(1)
SPEC = CaptureSpec(16, 1e-2)
PARAMS = {
    "nucleus": SamplingParams(0.9, 0.95, 0, 20),
    "greedy": SamplingParams(0.0, 1.0, 0, 20),
    "unfiltered": SamplingParams(1.0, 1.0, 0, 20),
    "all-filters": SamplingParams(0.8, 0.9, 30, 20, min_p=0.01),
}


@pytest.fixture(scope="module", params=[12.0, 0.02], ids=["peaked", "flat"])
def models(request):
    """The same model without its module and with it."""
    model = spread(request.param)
    return Runner(model), MtpRunner(model, module(model))


def table(samples) -> dict:
    return {(sample.key, sample.sample_index): sample for sample in samples}


def assert_same(found: dict, wanted: dict) -> None:
    assert found.keys() == wanted.keys()
    for cell, sample in wanted.items():
        assert found[cell].completion_ids == sample.completion_ids
        assert found[cell].finish_reason == sample.finish_reason
        if sample.dists is None:
            assert found[cell].dists is None
            continue
        for name in ("offsets_T1", "ids_S", "sampled_T"):
            assert np.array_equal(getattr(found[cell].dists, name), getattr(sample.dists, name))
        for name in ("logprobs_S", "tail_T", "logsumexp_T"):
            assert np.allclose(getattr(found[cell].dists, name), getattr(sample.dists, name), atol=1e-4)


@pytest.mark.parametrize("name", PARAMS)
def test_tokens_and_distributions_are_those_without_guesses(models, name):
    plain, guessing = models
    asked_for, params = requests(8, 3), PARAMS[name]
    wanted = table(PagedGenerator(plain, 24, STOPS).sample(asked_for, params, SPEC))
    generator = SpeculativeGenerator(guessing, 24, STOPS)
    assert_same(table(generator.sample(asked_for, params, SPEC)), wanted)
    assert generator.pool.free == generator.pool.capacity
    drawn = sum(len(sample.completion_ids) - 1 for sample in wanted.values())
    assert generator.guessed + generator.right >= drawn  # each guess brings one token, each that held another


@pytest.mark.parametrize(("slots", "cache", "page"), [(24, None, 4), (7, None, 64), (12, 200, 8), (5, 72, 4)])
def test_samples_depend_on_neither_rows_nor_pages_nor_preemption(models, slots, cache, page):
    plain, guessing = models
    asked_for = requests(8, 3)
    wanted = table(PagedGenerator(plain, 24, STOPS).sample(asked_for, PARAMS["unfiltered"]))
    generator = SpeculativeGenerator(guessing, slots, STOPS, cache_tokens=cache, page_tokens=page)
    assert_same(table(generator.sample(asked_for, PARAMS["unfiltered"])), wanted)
    assert (generator.preempted > 0) == (cache is not None)
    assert generator.pool.free == generator.pool.capacity


def test_flat_distributions_are_guessed_by_their_random_numbers():
    # With random weights the module knows nothing: what it gets right, it owes to the random number that it shares.
    model = spread(0.002)
    generator = SpeculativeGenerator(MtpRunner(model, module(model)), 24, [])
    samples = list(generator.sample(requests(8, 3), PARAMS["unfiltered"]))
    assert all(len(sample.completion_ids) == 20 for sample in samples)
    assert generator.right > 0.7 * generator.guessed
    assert generator.guessed + generator.right == 24 * 19 + sum(_overdrawn(generator, samples))


def _overdrawn(generator, samples) -> list[int]:
    """Tokens beyond the budget: a row of one token left draws two where the guess held."""
    told = generator.guessed + generator.right - sum(len(sample.completion_ids) - 1 for sample in samples)
    assert 0 <= told <= len(samples)
    return [told]


def test_every_guess_is_what_the_module_of_transformers_would_draw():
    """After every step: over the row's whole sequence, without any cache, with the random number of the next token."""
    model = spread(3.0)
    layer = module(model)
    reference = _reference(model, layer)
    params = SamplingParams(1.0, 0.9, 0, 12)
    generator = SpeculativeGenerator(MtpRunner(model, layer), 6, [], page_tokens=4)
    rng = np.random.default_rng(3)
    prompts = [tuple(rng.integers(0, VOCAB, length).tolist()) for length in (1, 8, 8, 13)]  # 8: two full pages
    checked = 0
    with generator.rows() as loop:
        loop.admit([Row(SampleRequest(f"{i}", i, ids, 50 + i), params) for i, ids in enumerate(prompts)])
        for _ in range(20):
            loop.step()
            loop._upload()
            for place, running in enumerate(loop.rows):
                ids = [*running.row.request.prompt_ids, *running.tokens]
                logits_1V = reference(torch.tensor([ids]))
                u = torch.from_numpy(uniform(np.array([running.row.request.seed]), np.array([running.drawn])))
                assert int(generator.steps.guesses[place]) == int(draw(StepLogits(logits_1V), u, params))
                assert running.cached == len(ids) - 1 and running.drawn == len(running.tokens)
                checked += 1
    assert checked > 30


def _reference(model, layer):
    """ids [1, T] -> logits [1, V] of the module for the token after the next, by transformers."""
    model.config.num_mtp_layers = 1
    mtp = MtpModel(model, 1)
    state = {
        {"enorm.weight": "enorm.weight", "hnorm.weight": "hnorm.weight", "eh_proj.weight": "eh_proj.weight",
         "shared_head.norm.weight": "post_norm.weight"}.get(name, f"mtp_block.{name}"): tensor
        for name, tensor in layer.state_dict().items()
    }  # fmt: skip
    mtp.layers[0].load_state_dict(state)
    mtp.eval()

    def logits(ids_1T: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            hidden_1TE = model.base_model(ids_1T[:, :-1]).last_hidden_state
            positions_1T = torch.arange(1, ids_1T.shape[1]).unsqueeze(0)
            hidden_1TE = mtp.forward_layer(0, hidden_1TE, positions_1T, None, input_ids=ids_1T[:, 1:])
            return model.lm_head(hidden_1TE[:, -1])

    return logits


def test_drawn_tokens_follow_the_law_of_the_filtered_distribution():
    """Chi-square of the second and third token over many seeds, against the model's own distributions."""
    model = spread(0.3, vocab_size=40)
    generator = SpeculativeGenerator(MtpRunner(model, module(model)), 256, [])
    prompt, count, params = (5, 6, 7), 4000, SamplingParams(0.9, 0.8, 0, 3)
    seeds = np.random.default_rng(0).integers(1 << 62, size=count).tolist()
    samples = list(generator.sample([SampleRequest("p", i, prompt, seed) for i, seed in enumerate(seeds)], params))
    assert 0.05 * generator.guessed < generator.right < generator.guessed  # both ends of a step are drawn from
    first = np.array([sample.completion_ids[0] for sample in samples])
    for position, before in ((1, np.bincount(first).argmax()), (2, None)):
        chosen = [s for s in samples if before is None or s.completion_ids[0] == before]
        law = _law(model, prompt, params, position, [] if before is None else [int(before)])
        counts = np.bincount([s.completion_ids[position] for s in chosen], minlength=40)
        assert counts[law == 0].sum() == 0
        expected = law[law > 0] / law.sum() * counts.sum()
        likely = expected > 5
        observed, wanted = counts[law > 0][likely], expected[likely]
        statistic, freedom = ((observed - wanted) ** 2 / wanted).sum(), len(wanted) - 1
        # Wilson and Hilferty 1931: the cube root of chi-square over its degrees of freedom is nearly normal.
        normal = ((statistic / freedom) ** (1 / 3) - 1 + 2 / (9 * freedom)) / (2 / (9 * freedom)) ** 0.5
        assert freedom > 8 and abs(normal) < 3.5


def _law(model, prompt, params, position, known) -> np.ndarray:
    """float64 [V]: the distribution of the token at `position` after known first tokens, all others summed over."""
    paths = {tuple(known): 1.0}
    while True:
        length = len(next(iter(paths)))
        new: dict[tuple, float] = {}
        total = np.zeros(model.config.vocab_size)
        ids = torch.tensor([[*prompt, *path] for path in paths])
        with torch.inference_mode():
            logits_PV = torch.cat([model(part).logits[:, -1] for part in ids.split(512)]).double()
        for (path, mass), logits_V in zip(paths.items(), logits_PV):
            kept_V = _filtered(logits_V, params) * mass
            total += kept_V
            if length < position:
                new |= {(*path, token): kept_V[token] for token in np.flatnonzero(kept_V)}
        if length == position:
            return total
        paths = new


def _filtered(logits_V: torch.Tensor, params: SamplingParams) -> np.ndarray:
    weights = (logits_V / params.temperature).softmax(-1).numpy()
    order = np.argsort(-weights, kind="stable")
    above = np.cumsum(weights[order]) - weights[order]
    kept = np.zeros_like(weights)
    kept[order[above < params.top_p]] = weights[order[above < params.top_p]]
    return kept / kept.sum()


def test_rows_that_end_in_different_ways_end_as_without_guesses(models):
    plain, guessing = models
    settings = [
        (SamplingParams(0.0, 1.0, 0, 1), None),
        (SamplingParams(0.7, 0.9, 0, 2), SPEC),
        (SamplingParams(1.0, 1.0, 0, 15), CaptureSpec(5, 0.1, 3)),
        (SamplingParams(1.0, 1.0, 0, 9, stop=("7 1", "2 5")), SPEC),
    ]
    asked_for = requests(8, 2)
    rows = [Row(request, *settings[i % 4], live=i % 3 == 0) for i, request in enumerate(asked_for)]
    told = []
    for make, runner in ((PagedGenerator, plain), (SpeculativeGenerator, guessing)):
        generator = make(runner, 9, STOPS, lambda: [b"%d " % i for i in range(VOCAB)], page_tokens=8)
        found: dict[int, list] = {}
        with generator.rows() as loop:
            owners, waiting = [], list(rows)
            while waiting or loop.active:
                now, waiting = waiting[: loop.free], waiting[loop.free :]
                owners += loop.admit(now) if now else []
                loop.step()
                for drawn in loop.news():
                    found.setdefault(drawn.owner, []).append(drawn)
                if len(owners) == len(rows) and 13 in owners:
                    loop.cancel([13])
        found.pop(13, None)
        told.append(found)
        assert generator.pool.free == generator.pool.capacity
    plain_told, guessing_told = told
    assert plain_told.keys() == guessing_told.keys()
    for owner, drawn in plain_told.items():
        other = guessing_told[owner]
        assert [t for d in drawn for t in d.token_ids] == [t for d in other for t in d.token_ids]
        assert (drawn[-1].finish_reason, drawn[-1].stop) == (other[-1].finish_reason, other[-1].stop)


def test_long_prompts_in_chunks_and_guesses_over_them(models, monkeypatch):
    plain, guessing = models
    rng = np.random.default_rng(2)
    asked_for = [
        SampleRequest(f"{n}", i, tuple(rng.integers(0, VOCAB, n).tolist()), i) for i, n in enumerate((90, 5, 33))
    ]
    wanted = table(PagedGenerator(plain, 4, []).sample(asked_for, PARAMS["unfiltered"], SPEC))
    rate = {}
    for tokens in (8192, 24):
        monkeypatch.setattr("teachers.scheduler.PREFILL_TOKENS", tokens)
        generator = SpeculativeGenerator(guessing, 4, [], page_tokens=8)
        assert_same(table(generator.sample(asked_for, PARAMS["unfiltered"], SPEC)), wanted)
        rate[tokens] = generator.right, generator.guessed
    assert len(set(rate.values())) == 1  # the module sees the same prompt, however it is cut


# ---- from a checkpoint -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    model = deepseek(**WIDE, vocab_size=1700)
    path = saved(model, tmp_path_factory.mktemp("mtp"))
    return add_to(path, module(model), model.config.num_hidden_layers)


def test_a_checkpoint_with_the_module_draws_with_it(folder):
    plain, guessing = TeacherEngine(folder, batch_size=6), TeacherEngine(folder, batch_size=6, speculative="mtp")
    params = SamplingParams(0.9, 0.95, 0, 12)
    wanted, found = (table(engine.sample(asked(plain), params, SPEC)) for engine in (plain, guessing))
    assert_same(found, wanted)
    assert guessing._generator.guessed > 0
    pairs = [((5, 6, 7), (8, 9)), ((5, 6, 8), (9,))]
    for one, other in zip(plain.score(pairs, SPEC), guessing.score(pairs, SPEC)):
        assert np.array_equal(one.ids_S, other.ids_S) and np.allclose(one.logprobs_S, other.logprobs_S, atol=1e-4)


def test_a_checkpoint_in_fp8_draws_with_its_module(folder, tmp_path):
    fp8 = quantised_copy(folder, tmp_path / "fp8")
    plain, guessing = TeacherEngine(fp8, batch_size=6), TeacherEngine(fp8, batch_size=6, speculative="mtp")
    params = SamplingParams(0.9, 0.95, 0, 12)
    wanted, found = (table(engine.sample(asked(plain), params, SPEC)) for engine in (plain, guessing))
    assert_same(found, wanted)
    ((_, layer),) = guessing._generator.runner.module
    exact = module(deepseek(**WIDE, vocab_size=1700)).mlp.experts.down_proj
    error = (layer.experts.down - exact).norm() / exact.norm()
    assert 0 < error < 0.05  # widened from 8 bits


def test_every_count_of_an_engine_is_told_by_a_service(folder):
    engine = TeacherEngine(folder, batch_size=6, speculative="mtp")
    list(engine.sample(asked(engine), SamplingParams(0.9, 0.95, 0, 4)))
    engine.score([(tuple(range(5, 60)), (1,)), (tuple(range(5, 60)), (2,))], SPEC)
    counts, metrics = engine.counts, Metrics()
    assert counts["guesses"] > 0 and counts["shared_tokens"] == 54 and counts.keys() <= COUNTS.keys()
    for name in counts:
        metrics.watch(name, COUNTS[name], lambda name=name: engine.counts[name])
    assert f"distill_shared_tokens {54.0}" in metrics.text().decode()


def test_weights_of_the_module_are_those_of_the_file(folder):
    engine = TeacherEngine(folder, batch_size=2, speculative="mtp")
    runner, wanted = engine._generator.runner, module(deepseek(**WIDE, vocab_size=1700))
    ((place, layer),) = runner.module
    assert place == 3 and torch.equal(runner.join, wanted.eh_proj.weight)
    assert torch.equal(layer.experts.gate_up, wanted.mlp.experts.gate_up_proj)
    assert torch.equal(layer.experts.down, wanted.mlp.experts.down_proj)
    assert torch.equal(runner.guess_norm, wanted.shared_head["norm"].weight)
    assert torch.equal(runner.token_norm, wanted.enorm.weight) and torch.equal(runner.hidden_norm, wanted.hnorm.weight)


def test_what_cannot_guess_is_said(folder, tmp_path):
    without = saved(deepseek(**WIDE, vocab_size=1700), tmp_path / "without")
    with pytest.raises(ModelError, match=r"layers\.3\.eh_proj.*no multi-token prediction module"):
        TeacherEngine(without, speculative="mtp")
    odd = saved(deepseek(vocab_size=1700), tmp_path / "odd")
    with pytest.raises(ModelError, match="does not know this model"):
        TeacherEngine(odd, speculative="mtp")
    with pytest.raises(ModelError, match="whole model"):
        engine = TeacherEngine.__new__(TeacherEngine)
        engine.split = Split(tensor_parallel=2, rank=0, world=2)
        engine._speculative({}, folder, 1)


@pytest.mark.gpu
@pytest.mark.parametrize("name", PARAMS)
def test_on_a_gpu_in_fp32_samples_are_those_without_guesses(name):
    model = spread(0.02)
    layer = module(model).to("cuda")
    model = model.to("cuda")
    plain, guessing = Runner(model), MtpRunner(model, layer)
    asked_for = requests(12, 3)
    for slots, cache in ((36, 36 * 128), (7, 800)):  # the second preempts
        how = {"cache_tokens": cache, "page_tokens": 16}
        wanted = table(PagedGenerator(plain, slots, STOPS, **how).sample(asked_for, PARAMS[name], SPEC))
        found = table(SpeculativeGenerator(guessing, slots, STOPS, **how).sample(asked_for, PARAMS[name], SPEC))
        same = sum(found[cell].completion_ids == wanted[cell].completion_ids for cell in wanted)
        assert found.keys() == wanted.keys() and same >= len(wanted) - 2  # rounding may turn a close draw
