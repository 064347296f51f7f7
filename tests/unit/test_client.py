"""The client: patience with servers that fail, and honesty about servers that are not ours."""

import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from peer_server import Peer, serve
from transformers import LlamaConfig, LlamaForCausalLM

from distill import client_http
from distill.client import ServiceTeacher
from distill.client_http import Http
from distill.errors import ServiceError
from distill.records import CaptureSpec, SampleRequest, SamplingParams
from distill.sampling import StepLogits, capture_support
from distill.tokens import load_tokenizer, stop_ids

torch.set_num_threads(1)
PATH = str(Path(__file__).parents[2] / "teachers" / "tiny" / "teacher")
PARAMS = SamplingParams(0.8, 0.9, 0, 12)
SPEC = CaptureSpec(k_max=12, tail_bound=0.05)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(PATH)


@pytest.fixture(scope="module")
def logits(tokenizer):
    vocab = max(tokenizer.get_vocab().values()) + 1
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=vocab + 8, num_key_value_heads=2, **sizes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.25)
        model.lm_head.weight[stop_ids(tokenizer)] *= 3  # stop tokens now and then
    # The head has 8 rows more than the tokenizer has tokens, which no sane server draws: give them little mass.
    return lambda ids: _without_padding(model(torch.tensor([ids])).logits[0].detach(), vocab)


def _without_padding(logits_TV, vocab):
    logits_TV[:, vocab:] -= 30
    return logits_TV


@pytest.fixture
def peer(request, tokenizer, logits):
    text = lambda ids: tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)  # noqa: E731
    with serve(Peer(logits, text, faults=getattr(request, "param", ()))) as peer:
        yield peer


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch):
    monkeypatch.setattr(client_http, "FIRST_WAIT_S", 0.02)


def asked(count: int) -> list[SampleRequest]:
    return [SampleRequest(f"p{i}", 0, (20 + i, 30, 40 + i), 1000 + i) for i in range(count)]


def teacher(peer, **more) -> ServiceTeacher:
    return ServiceTeacher(peer.url, PATH, **{"concurrency": 4, "patience_s": 5} | more)


# --- Another server's answers ---------------------------------------------------------------------------------------


def test_samples_of_another_server_are_the_ids_it_drew_with_every_setting_sent(peer, tokenizer):
    client = teacher(peer)
    samples = {s.key: s for s in client.sample(asked(10), PARAMS)}
    sent = {a["seed"]: a for a in peer.asked if a["seed"] >= 1000}
    assert len(samples) == len(sent) == 10
    for request in asked(10):
        sample, found = samples[request.key], sent[request.seed]
        assert found["prompt"] == list(request.prompt_ids) and found["stop_token_ids"] == client.stop_ids
        assert (found["temperature"], found["top_p"], found["top_k"], found["max_tokens"]) == (0.8, 0.9, -1, 12)
        assert (found["repetition_penalty"], found["min_p"]) == (1.0, 0.0)
        assert sample.completion_ids == peer.complete(found)["choices"][0]["token_ids"]
        assert (sample.completion_ids[-1] in client.stop_ids) == (sample.finish_reason == "stop")
    assert {s.finish_reason for s in samples.values()} == {"stop", "length"}
    assert any("seed" in each for each in client.limitations(None))


def test_distributions_of_another_server_are_cut_as_the_engine_cuts_them(peer, logits):
    client = teacher(peer)
    for sample in client.sample(asked(6), PARAMS, SPEC):
        prompt = next(r.prompt_ids for r in asked(6) if r.key == sample.key)
        rows = logits([*prompt, *sample.completion_ids])[len(prompt) - 1 : -1, : client.vocab_size]
        wanted = capture_support(StepLogits(rows), torch.tensor(sample.completion_ids), SPEC)
        dists = sample.dists
        assert np.diff(dists.offsets_T1).tolist() == wanted.count_A.tolist()
        assert dists.sampled_T.tolist() == sample.completion_ids
        assert np.allclose(dists.tail_T, wanted.tail_A, atol=1e-5)
        for t, (first, last) in enumerate(zip(dists.offsets_T1, dists.offsets_T1[1:])):
            assert dists.ids_S[first:last].tolist() == wanted.ids_AK[t, : last - first].tolist()
            assert np.allclose(dists.logprobs_S[first:last], wanted.logprobs_AK[t, : last - first], atol=1e-5)
        assert not dists.logsumexp_T.any()
    assert any("logsumexp" in each for each in client.limitations(SPEC))
    assert any("tail" in each for each in client.limitations(SPEC))


def test_scores_of_another_server_are_its_distributions_over_the_prompt(peer, logits):
    client = teacher(peer)
    pairs = [((20, 30), (40, 50, 60)), ((7,), (8, 9)), ((1, 2, 3, 4), (5,))]
    for (prompt, completion), dists in zip(pairs, client.score(pairs, SPEC), strict=True):
        rows = logits([*prompt, *completion])[len(prompt) - 1 : -1, : client.vocab_size]
        wanted = capture_support(StepLogits(rows), torch.tensor(completion), SPEC)
        assert np.diff(dists.offsets_T1).tolist() == wanted.count_A.tolist()
        assert dists.sampled_T.tolist() == list(completion) and np.allclose(dists.tail_T, wanted.tail_A, atol=1e-5)


FAULTS = [
    (("processed",), SPEC, "change with temperature", "raw_logprobs"),
    (("scaled",), SPEC, "change with temperature", "raw_logprobs"),
    (("logits",), SPEC, "add up to more than 1", "raw_logprobs"),
    (("text keys",), SPEC, "by their text", "teachers/serve.py"),
    (("no logprobs",), SPEC, "fewer log-probabilities than tokens", "teacher.capture"),
    (("few",), CaptureSpec(12, 1e-4), "returned 5 log-probabilities|returned 6 log-probabilities", "--max-logprobs"),
    (("no ids",), None, "does not return token ids", "return_token_ids"),
]


@pytest.mark.parametrize(("peer", "capture", "what", "remedy"), FAULTS, indirect=["peer"])
def test_what_another_server_cannot_give_is_found_before_anything_is_sampled(peer, capture, what, remedy):
    client = teacher(peer)
    with pytest.raises(ServiceError, match=what) as error:
        client.sample(asked(3), PARAMS, capture)
    assert remedy in error.value.remedy and peer.url in str(error.value)
    assert all(each["seed"] == 1 for each in peer.asked)  # the probes alone


@pytest.mark.parametrize("peer", [("processed",), ("text keys",), ("no logprobs",)], indirect=True)
def test_a_server_that_cannot_give_distributions_still_gives_samples(peer):
    assert len(list(teacher(peer).sample(asked(3), PARAMS))) == 3


@pytest.mark.parametrize("peer", [("no scores",)], indirect=True)
def test_a_server_that_cannot_score_says_so(peer):
    with pytest.raises(ServiceError, match="prompt_logprobs"):
        teacher(peer).score([((1,), (2,))], SPEC)


def test_drawing_from_the_tail_needs_our_own_service(peer):
    with pytest.raises(ServiceError, match="tail") as error:
        teacher(peer).sample(asked(1), PARAMS, CaptureSpec(12, 0.05, tail_draws=4))
    assert "tail_draws" in error.value.remedy


def test_a_server_with_another_tokenizer_is_found(peer, tokenizer):
    peer.text = lambda ids: tokenizer.decode([(i * 7 + 1) % 1500 for i in ids])
    with pytest.raises(ServiceError, match="tokenizer"):
        teacher(peer).sample(asked(1), PARAMS)


def test_of_several_models_the_one_called_like_the_path_is_asked(peer):
    peer.models = [{"id": "a"}, {"id": "b", "root": PATH}]
    client = teacher(peer)
    list(client.sample(asked(1), PARAMS))
    assert {each["model"] for each in peer.asked} == {"b"}
    peer.models = [{"id": "a"}, {"id": "b"}]
    with pytest.raises(ServiceError, match="one model"):
        teacher(peer)


def test_the_fingerprint_of_another_server_follows_its_model(peer):
    one = teacher(peer).fingerprint
    assert one == teacher(peer).fingerprint and len(one) == 16
    peer.models = [{"id": "org/other", "owned_by": "vllm"}]
    assert teacher(peer).fingerprint != one


# --- Patience -------------------------------------------------------------------------------------------------------


def test_a_server_that_fails_for_a_while_costs_time_and_no_sample(peer):
    client = teacher(peer)
    peer.replies += [
        "hang up",
        (503, {"error": {"message": "starting"}}),
        (429, b"", {"Retry-After": "0"}),
        (502, b"x"),
    ]
    assert len({s.key for s in client.sample(asked(12), PARAMS)}) == 12
    assert peer.replies == []


def test_retry_after_is_waited_for(peer, monkeypatch):
    client, waits = teacher(peer), []
    list(client.sample(asked(1), PARAMS))
    monkeypatch.setattr(client_http.random, "uniform", lambda low, high: waits.append((low, high)) or 1.0)
    peer.replies.append((429, {"error": "busy"}, {"Retry-After": "1"}))
    since_s = time.monotonic()
    list(client.sample(asked(1), PARAMS))
    assert time.monotonic() - since_s >= 1 and waits == [(0.5, 1.0)]


def test_patience_ends_with_what_went_wrong_last(peer):
    client = teacher(peer, patience_s=0.3)
    peer.replies += [(503, {"error": {"message": "out of order"}})] * 500
    with pytest.raises(ServiceError, match="503: out of order") as error:
        list(client.sample(asked(2), PARAMS))
    assert "what is finished is kept" in error.value.remedy


def test_a_server_that_is_gone_is_told_of_while_it_is_waited_for(peer, monkeypatch, capsys):
    monkeypatch.setattr(client_http, "TELL_S", 0.2)
    client = teacher(peer, patience_s=1.0)
    peer.replies += [(503, {"error": {"message": "out of order"}})] * 500
    with pytest.raises(ServiceError):
        list(client.sample(asked(8), PARAMS))
    lines = capsys.readouterr().err.splitlines()
    assert 2 <= len(lines) <= 5  # of all four connections together
    assert all(peer.url in line and "503: out of order" in line and "s more" in line for line in lines)


def test_a_server_that_allows_fewer_log_probabilities_is_refused_with_its_option(peer):
    client, message = teacher(peer), "Requested sample logprobs of 64, which is greater than max allowed: 20"
    peer.replies.append((400, {"error": {"message": message}}, ()))
    with pytest.raises(ServiceError, match=message) as error:
        client.sample(asked(1), PARAMS, CaptureSpec(64, 1e-3))
    assert "--max-logprobs 64" in error.value.remedy and "k_max" in error.value.remedy


def test_a_server_that_is_not_there_is_told_of(peer, monkeypatch):
    monkeypatch.setattr(client_http, "MEETING_S", 0.2)
    with pytest.raises(ServiceError, match="Connection refused"):
        ServiceTeacher("http://127.0.0.1:9", PATH)


@pytest.mark.parametrize(
    ("status", "remedy"),
    [(400, "message"), (401, "token_env"), (403, "token_env"), (404, "teacher.url"), (301, "teacher.url")],
)
def test_a_refusal_is_not_asked_again(peer, status, remedy):
    client = teacher(peer)
    list(client.sample(asked(1), PARAMS))
    before = len(peer.asked)
    peer.replies.append((status, {"error": {"message": "no"}}, {"Location": "http://evil.example"}))
    with pytest.raises(ServiceError, match=f"{status}: no") as error:
        list(client.sample(asked(1), PARAMS))
    assert remedy in error.value.remedy and len(peer.asked) == before


def test_an_answer_that_is_no_json_is_an_error_that_shows_it(peer):
    peer.replies.append((200, b"<html>"))
    with pytest.raises(ServiceError, match="JSON") as error:
        teacher(peer)
    assert "<html>" in str(error.value)


def test_the_token_is_sent_and_never_told(peer):
    client = teacher(peer, token="hunter2-hunter2-hunter2")
    list(client.sample(asked(1), PARAMS))
    assert peer.tokens == {"Bearer hunter2-hunter2-hunter2"}
    peer.replies.append((401, {"error": {"message": "Bearer hunter2-hunter2-hunter2 is wrong"}}))
    with pytest.raises(ServiceError) as error:
        list(client.sample(asked(1), PARAMS))
    assert "hunter2" not in str(error.value)


@pytest.mark.parametrize("url", ["ftp://host", "http://", "http://user:word@host", "http://host?x=1", "host:80"])
def test_what_is_no_address_is_refused(url):
    with pytest.raises(ServiceError, match="address"):
        Http(url)


def test_addresses_with_and_without_the_api_path_are_one():
    assert {Http(f"http://h:1{end}").url for end in ("", "/", "/v1", "/v1/")} == {"http://h:1"}
    assert Http("https://h/api/v1").url == "https://h/api"


# --- Many at once ---------------------------------------------------------------------------------------------------


def test_no_more_requests_are_in_flight_than_asked_for_and_they_are_taken_as_they_are_needed(peer):
    now, most, lock, real = 0, 0, threading.Lock(), peer.complete

    def counted(content):
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        time.sleep(0.02)
        try:
            return real(content)
        finally:
            with lock:
                now -= 1

    taken = []

    def stream():
        for request in asked(40):
            taken.append(request.key)
            yield request

    client = teacher(peer, concurrency=3)
    list(client.sample([], PARAMS))
    peer.complete = counted
    samples = client.sample(stream(), PARAMS)
    next(samples)
    assert len(taken) < 12
    assert len(list(samples)) == 39 and 2 <= most <= 3


def test_a_consumer_that_stops_early_ends_what_is_under_way(peer):
    client, hold = teacher(peer), threading.Event()
    list(client.sample(asked(1), PARAMS))
    real = peer.complete
    peer.complete = lambda content: (content["seed"] == 1000 or hold.wait(30)) and real(content)
    samples = client.sample(asked(8), PARAMS)
    next(samples)
    since_s = time.monotonic()
    samples.close()
    while any(thread.name == "client" for thread in threading.enumerate()):
        assert time.monotonic() - since_s < 10
        time.sleep(0.01)
    hold.set()
    peer.complete = real
    assert len(list(client.sample(asked(3), PARAMS))) == 3  # the client itself goes on
    client.close()
    with pytest.raises(RuntimeError, match="closed"):
        list(client.sample(asked(3), PARAMS))


def test_an_error_in_the_requests_themselves_is_raised(peer):
    def broken():
        yield asked(1)[0]
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        list(teacher(peer).sample(broken(), PARAMS))


def test_the_client_needs_no_torch():
    code = "import sys, distill.client; assert not {'torch', 'transformers', 'httpx'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, cwd=Path(PATH).parents[2])
