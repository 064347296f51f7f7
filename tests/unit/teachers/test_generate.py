"""The generate loop: what is drawn depends on nothing but model, prompt, seed and parameters."""

import numpy as np
import pytest
import torch
from sampling_models import STOPS, VOCAB, as_table, deepseek, generator, llama, qwen3, requests, slot_model
from transformers import GenerationConfig

from distill.errors import DataError, ModelError
from distill.generate import Generator
from distill.records import CaptureSpec, SampleRequest, SamplingParams
from distill.slots import SlotModel

torch.set_num_threads(1)
PARAMS = SamplingParams(temperature=0.9, top_p=0.95, top_k=0, max_new_tokens=40)
SPEC = CaptureSpec(k_max=16, tail_bound=1e-2)
FULL = {"deepseek": deepseek, "qwen3": qwen3, "llama": llama}


@pytest.fixture(params=FULL, scope="module")
def model(request):
    return FULL[request.param]()


def test_samples_do_not_depend_on_batch_size_order_capture_or_threads(model):
    asked, params = requests(prompts=12, samples=2), SamplingParams(0.9, 0.95, 0, 24)
    tables = [as_table(generator(model, slots).sample(asked, params)) for slots in (64, 7)]
    tables.append(as_table(generator(model, 5).sample(asked[::-1], params, SPEC)))
    assert len(tables[0]) == 24 and all(table == tables[0] for table in tables)
    assert len({tuple(ids) for ids, _ in tables[0].values()}) > 20  # they are samples, not one text
    reasons = [reason for _, reason in tables[0].values()]
    assert reasons.count("stop") > 2 and reasons.count("length") > 2

    alone = as_table(generator(model, 1).sample(asked[:4], params))
    torch.set_num_threads(2)
    threaded = as_table(generator(model, 4).sample(asked[:4], params))
    torch.set_num_threads(1)
    assert alone == threaded == {cell: tables[0][cell] for cell in alone}


def test_completions_end_with_their_first_stop_id_or_at_the_budget(model):
    for sample in generator(model, 8).sample(requests(10, 2), PARAMS):
        stops = [i for i, token in enumerate(sample.completion_ids) if token in STOPS]
        if sample.finish_reason == "stop":
            assert stops == [len(sample.completion_ids) - 1]
        else:
            assert stops == [] and len(sample.completion_ids) == 40


def test_greedy_equals_transformers_generate(model):
    asked = requests(6, 1)
    found = as_table(generator(model, 4).sample(asked, SamplingParams(0, 1, 0, 24)))
    config = GenerationConfig(max_new_tokens=24, do_sample=False, eos_token_id=STOPS, pad_token_id=0)
    for request in asked:
        ids = torch.tensor([request.prompt_ids])
        wanted = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
        assert found[request.key, 0][0] == wanted[0, ids.shape[1] :].tolist()


def test_captured_distributions_are_those_of_a_whole_forward_in_float64(model):
    asked = {(r.key, r.sample_index): r for r in requests(5, 2)}
    for sample in generator(model, 4).sample(asked.values(), PARAMS, SPEC):
        prompt = asked[sample.key, sample.sample_index].prompt_ids
        ids = torch.tensor([[*prompt, *sample.completion_ids]])
        with torch.inference_mode():
            logits_TV = model(ids).logits[0, len(prompt) - 1 : -1].double()
        exact_TV, dists = logits_TV.log_softmax(-1), sample.dists
        assert len(dists) == len(sample.completion_ids)
        assert dists.sampled_T.tolist() == sample.completion_ids
        assert np.allclose(dists.logsumexp_T, logits_TV.logsumexp(-1), atol=1e-4)
        for t, exact_V in enumerate(exact_TV):
            entries = slice(dists.offsets_T1[t], dists.offsets_T1[t + 1])
            stored = dists.ids_S[entries]
            assert np.allclose(dists.logprobs_S[entries], exact_V[stored], atol=1e-4)
            assert dists.tail_T[t] == pytest.approx(1 - exact_V[stored].exp().sum().item(), abs=1e-4)
            assert sample.completion_ids[t] in stored
    assert dists.ids_S.dtype == np.int32 and dists.logprobs_S.dtype == np.float32 and dists.offsets_T1.dtype == np.int64


def test_scoring_a_sample_gives_the_distributions_captured_while_drawing_it(model):
    loop, asked = generator(model, 5), {(r.key, r.sample_index): r for r in requests(7, 2)}
    samples = list(loop.sample(asked.values(), PARAMS, SPEC))
    pairs = [(asked[s.key, s.sample_index].prompt_ids, s.completion_ids) for s in samples]
    for sample, scored in zip(samples, loop.score(pairs, SPEC), strict=True):
        drawn = sample.dists
        assert np.array_equal(scored.sampled_T, drawn.sampled_T)
        assert np.allclose(scored.logsumexp_T, drawn.logsumexp_T, atol=1e-4)
        for t in range(len(drawn)):  # noise may move the cut by a token: compare what both stored
            a, b = (
                dict(zip(d.ids_S[lo:hi].tolist(), d.logprobs_S[lo:hi].tolist()))
                for d in (drawn, scored)
                for lo, hi in [d.offsets_T1[t : t + 2]]
            )
            assert abs(len(a) - len(b)) <= 1
            assert all(a[i] == pytest.approx(b[i], abs=1e-4) for i in a.keys() & b.keys())


def test_scoring_in_chunks_equals_scoring_at_once(model, monkeypatch):
    pairs = [(tuple(range(20, 30)), tuple(range(40, 40 + n))) for n in (1, 30, 7, 0)]
    loop = generator(model, 2)
    whole = loop.score(pairs, SPEC)
    monkeypatch.setattr("distill.generate.SCORE_LOGITS", 3 * VOCAB)
    chunked = loop.score(pairs, SPEC)
    assert [len(d) for d in whole] == [1, 30, 7, 0]
    for a, b in zip(whole, chunked):
        assert np.array_equal(a.ids_S, b.ids_S) and np.array_equal(a.offsets_T1, b.offsets_T1)
        assert np.allclose(a.logprobs_S, b.logprobs_S, atol=1e-5) and np.allclose(a.tail_T, b.tail_T, atol=1e-6)


def test_requests_are_taken_as_slots_free_up_and_samples_come_before_the_end(model):
    taken = []

    def stream():
        for request in requests(40, 1):
            taken.append(request.key)
            yield request

    loop = generator(model, 4).sample(stream(), PARAMS)
    next(loop)
    assert len(taken) < 40
    loop.close()


def test_no_id_beyond_the_tokenizer_is_drawn_or_has_mass():
    # The tokenizer ends at 600 although the head has 700 rows: the other 100 are padding.
    loop = Generator(SlotModel(qwen3(), vocab_size=600), 8, STOPS)
    samples = list(loop.sample([SampleRequest("p", i, (30, 31), i) for i in range(16)], PARAMS, CaptureSpec(700, 0.0)))
    assert max(max(s.completion_ids) for s in samples) < 600
    for sample in samples:
        mass = np.exp(sample.dists.logprobs_S.astype(np.float64))
        sums = np.add.reduceat(mass, sample.dists.offsets_T1[:-1])
        assert sample.dists.ids_S.max() < 600 and np.allclose(sums, 1, atol=1e-5)


@pytest.mark.parametrize(
    ("prompt", "budget", "message"),
    [((), 10, "no tokens"), ((5, VOCAB), 10, "outside"), ((5,) * 250, 10, "256 positions")],
)
def test_prompts_that_cannot_run_are_named(model, prompt, budget, message):
    loop = generator(model, 2)
    with pytest.raises(DataError, match=message) as error:
        list(loop.sample([SampleRequest("abc", 0, prompt, 1)], SamplingParams(1, 1, 0, budget)))
    assert "abc" in str(error.value)


def test_a_stop_id_that_the_model_lacks_is_an_error(model):
    with pytest.raises(ModelError, match="stop id"):
        generator(model, 2, stops=[VOCAB])


def test_the_model_is_left_as_it_was_even_when_the_consumer_stops_early(model):
    model.train()
    before = model.config._attn_implementation
    loop = generator(model, 2)
    running = loop.sample(requests(4, 2), PARAMS)
    next(running)
    assert not model.training
    with pytest.raises(RuntimeError, match="still open"):
        next(loop.sample(requests(1, 1), PARAMS))
    running.close()
    assert model.training and model.config._attn_implementation == before
    model.eval()
    assert len(list(loop.sample(requests(1, 1), PARAMS))) == 1


def test_grad_mode_of_the_consumer_is_untouched_between_samples(model):
    for _ in generator(model, 2).sample(requests(2, 1), PARAMS):
        assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()


def test_bfloat16_rows_stay_close_to_float32():
    # Smaller logits: bfloat16 keeps 8 bits, so the error is relative to them.
    model, ids = llama(), torch.arange(30, 60)[None]
    with torch.inference_mode():
        wanted = model(ids).logits[0, -1]
    half = slot_model(model.to(torch.bfloat16))
    with half.session(slots=1):
        slot, one = torch.tensor([0]), torch.ones(1, dtype=torch.int64)
        half.prefill(ids[:, :29], 29 * one, slot, slot)
        logits = half.decode(ids[0, 29:], 29 * one, 30)
    assert (logits[0] - wanted).norm() < 0.1 * wanted.norm()
