"""The routes of the service: OpenAI's answers over what the engine draws, checked against the engine and the model."""

import base64
import json
import subprocess

import numpy as np
import openai
import pytest
import torch
from service_world import serving

from distill import wire
from distill.records import CaptureSpec, SampleRequest, SamplingParams
from distill.tokens import render_prompt
from teachers.service_requests import choice_seed

QUESTION = "What is 17 + 25?"
SAMPLED = {"temperature": 0.8, "top_p": 0.95, "seed": 11, "max_tokens": 40}
PARAMS = SamplingParams(0.8, 0.95, 0, 40)


@pytest.fixture(scope="module")
def world(bundled):
    with serving(bundled) as world:
        yield world


@pytest.fixture(scope="module")
def client(world):
    return openai.OpenAI(base_url=f"{world.url}/v1", api_key="none", max_retries=0)


def drawn(engine, ids, n=1, params=PARAMS, seed=11, capture=None):
    asked = [SampleRequest("p", i, tuple(ids), choice_seed(seed, i)) for i in range(n)]
    return sorted(engine.sample(asked, params, capture), key=lambda s: s.sample_index)


@pytest.fixture(scope="module")
def expected(bundled):
    """What the engine itself draws, before the service has it."""
    chat = drawn(bundled, render_prompt(bundled.tokenizer, QUESTION), 3)
    ids = bundled.tokenizer.encode("1 + 1 =")
    captured = drawn(bundled, ids, 2, capture=CaptureSpec(20, 1e-3))
    return {"chat": chat, "ids": ids, "captured": captured}


@pytest.fixture(scope="module", autouse=True)
def _engine_first(expected, world):
    """The engine runs one loop at a time: what is expected is drawn before the service begins."""


def test_a_chat_of_the_openai_client_is_what_the_engine_draws(client, world, expected):
    answer = client.chat.completions.create(
        model="teacher", messages=[{"role": "user", "content": QUESTION}], n=3, **SAMPLED
    )
    assert [c.message.content for c in answer.choices] == [
        world.engine.decode(s.completion_ids) for s in expected["chat"]
    ]
    assert [c.finish_reason for c in answer.choices] == [s.finish_reason for s in expected["chat"]]
    prompt = len(render_prompt(world.engine.tokenizer, QUESTION))
    completion = sum(len(s.completion_ids) for s in expected["chat"])
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (prompt, completion)
    assert answer.usage.total_tokens == prompt + completion and answer.system_fingerprint == world.engine.fingerprint


def test_a_stream_of_the_openai_client_adds_up_to_the_whole_answer(client, world, expected):
    stream = client.chat.completions.create(
        model="teacher",
        messages=[{"role": "user", "content": QUESTION}],
        n=3,
        stream=True,
        stream_options={"include_usage": True},
        **SAMPLED,
    )
    texts, reasons, usage = [""] * 3, [None] * 3, None
    for chunk in stream:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            reasons[choice.index] = choice.finish_reason or reasons[choice.index]
    assert texts == [world.engine.decode(s.completion_ids) for s in expected["chat"]]
    assert reasons == [s.finish_reason for s in expected["chat"]]
    assert usage.completion_tokens == sum(len(s.completion_ids) for s in expected["chat"])


def test_completions_take_texts_and_token_ids_and_several_prompts(client, expected):
    ids = expected["ids"]
    by_text = client.completions.create(model="teacher", prompt="1 + 1 =", **SAMPLED)
    by_ids = client.completions.create(model="teacher", prompt=ids, **SAMPLED)
    assert by_text.choices[0].text == by_ids.choices[0].text
    many = client.completions.create(model="teacher", prompt=[ids, ids[:2]], n=2, **SAMPLED)
    assert [c.index for c in many.choices] == [0, 1, 2, 3] and many.choices[0].text == by_ids.choices[0].text
    assert many.usage.prompt_tokens == len(ids) + 2


def test_a_text_of_many_prompts_is_encoded_as_the_tokenizer_does(world):
    texts = ["a", "1 + 1", "é\u4e2d\U0001f600", "<think>"]
    for text in texts:
        found = world.good("/v1/completions", prompt=text, max_tokens=1, return_token_ids=True)["choices"][0]
        assert found["prompt_token_ids"] == world.engine.tokenizer.encode(text)


def test_log_probabilities_are_the_models_at_temperature_one(client, world, expected):
    ids = expected["ids"]
    given = client.completions.create(
        model="teacher", prompt=ids, logprobs=3, extra_body={"return_token_ids": True}, **SAMPLED
    ).choices[0]
    drawn_ids = given.token_ids[: len(given.logprobs.tokens)]
    with torch.inference_mode():
        exact_TV = world.engine.model(torch.tensor([[*ids, *given.token_ids]])).logits[0, len(ids) - 1 : -1]
        exact_TV = exact_TV[:, : world.engine.vocab_size].double().log_softmax(-1)
    tokens = world.process.service.tokens
    for t, token in enumerate(drawn_ids):
        assert given.logprobs.token_logprobs[t] == pytest.approx(exact_TV[t, token].item(), abs=1e-4)
        values, best = exact_TV[t].topk(3)
        top = given.logprobs.top_logprobs[t]
        assert list(top.values()) == pytest.approx(values.tolist(), abs=1e-4)
        assert list(top) == [tokens.text(i, False) for i in best.tolist()]
    assert "".join(given.logprobs.tokens) == given.text
    starts = [given.text[o : o + len(t)] for o, t in zip(given.logprobs.text_offset, given.logprobs.tokens)]
    assert starts == given.logprobs.tokens


def test_log_probabilities_of_a_chat_have_bytes_and_the_drawn_token_first_or_not(client):
    answer = client.chat.completions.create(
        model="teacher",
        messages=[{"role": "user", "content": QUESTION}],
        logprobs=True,
        top_logprobs=2,
        **SAMPLED | {"temperature": 1.5, "top_p": 1.0},
    ).choices[0]
    content = answer.logprobs.content
    assert b"".join(bytes(t.bytes) for t in content).decode() == answer.message.content
    assert all(len(t.top_logprobs) == 2 and t.top_logprobs[0].logprob >= t.logprob for t in content)
    assert any(t.token not in [each.token for each in t.top_logprobs] for t in content)  # hot: unlikely tokens too
    none = client.chat.completions.create(
        model="teacher", messages=[{"role": "user", "content": "1"}], max_tokens=3, logprobs=True
    )
    assert [t.top_logprobs for t in none.choices[0].logprobs.content] == [[]] * len(none.choices[0].logprobs.content)


def test_captured_distributions_are_those_of_the_engine_bit_for_bit_but_for_the_batch(world, expected):
    found = world.good(
        "/v1/completions",
        prompt=expected["ids"],
        n=2,
        capture={"k_max": 20, "tail_bound": 1e-3},
        return_token_ids=True,
        **SAMPLED,
    )["choices"]
    for choice, sample in zip(found, expected["captured"], strict=True):
        assert choice["token_ids"] == sample.completion_ids
        (dists,) = wire.unpack_all(base64.b64decode(choice["dists"]), "test")
        for name, column in vars(sample.dists).items():
            assert np.allclose(getattr(dists, name), column, atol=1e-4), name


def test_scores_are_the_engines_in_json_and_in_bytes(world, expected):
    pairs = [(expected["ids"], s.completion_ids) for s in expected["captured"]] * 20
    sequences = [{"prompt_ids": list(p), "completion_ids": c} for p, c in pairs]
    content = {"sequences": sequences, "capture": {"k_max": 20, "tail_bound": 1e-3}}
    answer = world.http.post("/v1/score", json=content, headers={"Accept": wire.MEDIA_TYPE})
    assert answer.headers["content-type"] == wire.MEDIA_TYPE
    found = wire.unpack_all(answer.content, "test")
    plain = world.good("/v1/score", **content)["data"]
    assert len(found) == len(plain) == len(pairs)
    for (_, completion), dists, listed, sample in zip(pairs, found, plain, expected["captured"] * 20):
        assert dists.sampled_T.tolist() == completion == listed["sampled"]
        assert np.allclose(dists.tail_T, sample.dists.tail_T, atol=1e-5)
        assert [i for each in listed["ids"] for i in each] == dists.ids_S.tolist()
        assert np.array_equal(np.float32([x for each in listed["logprobs"] for x in each]), dists.logprobs_S)
        assert np.array_equal(np.float32(listed["tail"]), dists.tail_T)
    again = world.http.post("/v1/score", json=content | {"format": "binary"})
    assert again.content == answer.content


def test_a_stop_text_ends_a_completion_and_never_shows_streamed_or_not(world, expected):
    whole = world.good("/v1/completions", prompt=expected["ids"], **SAMPLED)["choices"][0]["text"]
    stop = whole[9:12]
    at = whole.index(stop)
    answer = world.good("/v1/completions", prompt=expected["ids"], stop=[stop, "not there"], **SAMPLED)["choices"][0]
    assert (answer["text"], answer["finish_reason"], answer["stop_reason"]) == (whole[:at], "stop", stop)
    chunks = world.events("/v1/completions", prompt=expected["ids"], stop=stop, **SAMPLED)
    assert "".join(c["choices"][0]["text"] for c in chunks) == whole[:at]


def test_the_seed_decides_and_without_one_answers_differ(world):
    hot = {"prompt": [5, 6, 7], "temperature": 1.5, "max_tokens": 30}
    same = {world.good("/v1/completions", seed=-3, **hot)["choices"][0]["text"] for _ in range(2)}
    other = {world.good("/v1/completions", **hot)["choices"][0]["text"] for _ in range(3)}
    assert len(same) == 1 and len(other) == 3
    texts = [c["text"] for c in world.good("/v1/completions", n=4, seed=1, **hot)["choices"]]
    assert len(set(texts)) == 4


def test_models_name_the_one_that_is_served_and_what_it_is(client, world):
    (card,) = client.models.list().data
    assert card.id == "teacher" and client.models.retrieve("teacher").id == "teacher"
    facts = card.distill
    assert (facts["fingerprint"], facts["vocab_size"]) == (world.engine.fingerprint, world.engine.vocab_size)
    assert card.max_model_len == 2048


def test_curl_works_as_it_is(world):
    body = json.dumps({"model": "teacher", "prompt": "1 + 1 =", "max_tokens": 4, "temperature": 0})
    command = [
        "curl",
        "-sS",
        "--noproxy",
        "*",
        f"{world.url}/v1/completions",
        "-H",
        "Content-Type: application/json",
        "-d",
        body,
    ]
    answer = json.loads(subprocess.run(command, capture_output=True, check=True, timeout=60).stdout)
    assert answer["choices"][0]["text"] and answer["usage"]["completion_tokens"] <= 4
    stream = [*command[:-1], json.dumps(json.loads(body) | {"stream": True}), "-N"]
    assert subprocess.run(stream, capture_output=True, check=True, timeout=60).stdout.endswith(b"data: [DONE]\n\n")


def test_health_and_metrics_count_what_happened(world):
    before = world.http.get("/metrics").text
    world.good("/v1/completions", prompt="1", max_tokens=3, temperature=0)
    world.http.get("/no/such/thing")
    after = world.http.get("/metrics").text
    assert world.http.get("/health").json() == {"status": "ok", "model": "teacher", "running": 0, "waiting": 0}

    def value(text: str, name: str) -> float:
        return float(next((line.split(" ")[1] for line in text.splitlines() if line.startswith(name + " ")), "0"))

    for name, more in (
        ('distill_requests_total{route="/v1/completions",status="200"}', 1),
        ('distill_requests_total{route="other",status="404"}', 1),
        ("distill_completion_tokens_total", 3),
        ('distill_request_seconds_count{route="/v1/completions"}', 1),
    ):
        assert value(after, name) == value(before, name) + more, name
    assert value(after, "distill_slots") == 16 and value(after, "distill_running") == 0


BAD = [
    ({"prompt": []}, "prompt", "invalid_type"),
    ({"prompt": ""}, "prompt", "empty"),
    ({"prompt": [5, 10**9]}, "prompt.1", "out_of_range"),
    ({"prompt": [5, -1]}, "prompt.1", "out_of_range"),
    ({"prompt": [5, True]}, "prompt", "invalid_type"),
    ({"prompt": [[5], "x", []]}, "prompt.2", "empty"),
    ({"prompt": {"a": 1}}, "prompt", "invalid_type"),
    ({"prompt": [5] * 2000, "max_tokens": 100}, "prompt 0", "not_runnable"),
    ({"prompt": "x " * 40_000}, "prompt 0", "over_limit"),
    ({"prompt": "x" * 1_000_000}, "prompt", "over_limit"),
    ({"prompt": "x", "max_tokens": 0}, "max_tokens", "greater_than_equal"),
    ({"prompt": "x", "max_tokens": 10**9}, "max_tokens", "over_limit"),
    ({"prompt": "x", "n": 1000}, "n", "over_limit"),
    ({"prompt": ["x"] * 40, "n": 40}, "n", "over_limit"),
    ({"prompt": "x", "logprobs": 65}, "logprobs", "over_limit"),
    ({"prompt": "x", "logprobs": True}, "logprobs", "int_type"),
    ({"prompt": "x", "temperature": -0.1}, "temperature", "greater_than_equal"),
    ({"prompt": "x", "temperature": "hot"}, "temperature", "float_type"),
    ({"prompt": "x", "top_p": 0}, "top_p", "greater_than"),
    ({"prompt": "x", "seed": 2**63}, "seed", "less_than"),
    ({"prompt": "x", "stop": [""]}, "stop", "invalid_type"),
    ({"prompt": "x", "stop": ["a"] * 17}, "stop", "invalid_type"),
    ({"prompt": "x", "stop": 7}, "stop", "invalid_type"),
    ({"prompt": "x", "capture": {"k_max": 65}}, "capture.k_max", "over_limit"),
    ({"prompt": "x", "capture": {}, "logprobs": 1}, "capture", "contradiction"),
    ({"prompt": "x", "stream_options": {"include_usage": True}}, "stream_options", "contradiction"),
    ({"prompt": "x", "echo": True}, "echo", "value_error"),
    ({"prompt": "x", "temprature": 1}, "temprature", "extra_forbidden"),
    ({"temperature": 1}, "prompt", "missing"),
]  # fmt: skip


@pytest.mark.parametrize(("content", "param", "code"), BAD, ids=[str(case[0])[:60] for case in BAD])
def test_a_wrong_completion_is_refused_with_the_field_at_fault_and_a_remedy(world, content, param, code):
    answer = world.post("/v1/completions", **content)
    error = answer.json()["error"]
    assert answer.status_code == 400 and set(error) == {"message", "type", "param", "code"}
    assert (error["type"], error["param"], error["code"]) == ("invalid_request_error", param, code)
    assert param.split(".")[0].split(" ")[0] in error["message"] and len(error["message"]) < 1000
    assert error["message"].count(". ") >= 1  # what is wrong, and what to do about it
    assert world.desk.outstanding == 0


CHATS = [
    ({"messages": []}, "messages"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages.0.content"),
    ({"messages": [{"role": "user", "content": "a<|end|>b"}]}, "messages"),
    ({"messages": [{"role": "wizard", "content": "a"}]}, "messages"),
    ({"messages": [{"role": "user", "content": "a"}], "top_logprobs": 2}, "top_logprobs"),
    ({"messages": [{"role": "user", "content": "a"}], "tools": [{"type": "function"}]}, "tools"),
    ({"messages": [{"role": "user", "content": "a"}], "response_format": {"type": "json_object"}}, "response_format"),
    ({"messages": [{"role": "user", "content": "a", "name": "me"}]}, "messages.0.name"),
]


@pytest.mark.parametrize(("content", "param"), CHATS)
def test_a_wrong_chat_is_refused_with_the_field_at_fault(world, content, param):
    answer = world.post("/v1/chat/completions", **content)
    assert answer.status_code == 400 and answer.json()["error"]["param"] == param, answer.text


def test_a_chat_takes_what_openai_takes_where_it_changes_nothing(world):
    neutral = {"frequency_penalty": 0, "logit_bias": {}, "tools": [], "response_format": {"type": "text"}, "user": "me"}
    parts = [{"type": "text", "text": "What is "}, {"type": "text", "text": "1 + 1?"}]
    talk = [
        {"role": "user", "content": "1?"},
        {"role": "assistant", "content": "1"},
        {"role": "user", "content": parts},
    ]
    answer = world.good("/v1/chat/completions", messages=talk, max_completion_tokens=3, temperature=None, **neutral)
    assert answer["usage"]["completion_tokens"] <= 3


def test_errors_of_the_openai_client_have_its_classes(client):
    with pytest.raises(openai.NotFoundError, match="not served here"):
        client.completions.create(model="gpt-4", prompt="x")
    with pytest.raises(openai.BadRequestError, match="max_tokens"):
        client.completions.create(model="teacher", prompt="x", max_tokens=10**9)
    with pytest.raises(openai.NotFoundError, match="There are /v1/completions"):
        client.embeddings.create(model="teacher", input="x")
    with pytest.raises(openai.NotFoundError, match="not served"):
        client.models.retrieve("other")


def test_wrong_methods_and_bodies_that_are_no_json_objects(world):
    assert world.http.get("/v1/completions").status_code == 405
    assert world.http.request("DELETE", "/health").headers["allow"] == "GET"
    for body in (
        b"",
        b"{",
        b"[1]",
        b'"x"',
        b"null",
        b"\xff\xfe{}",
        b'{"prompt": "\\ud800"}',
        b'{"a":' * 5000,
        b"[" * 10**5,
    ):
        answer = world.http.post("/v1/completions", content=body)
        assert answer.status_code == 400 and answer.json()["error"]["code"] in ("invalid_json", "invalid_type"), body[
            :20
        ]
