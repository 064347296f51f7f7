"""The client against our own service: what the engine gives, over HTTP, to the last bit."""

import threading

import numpy as np
import pytest
import torch
import yaml
from service_world import TEACHER, TOKEN, serving, until

from distill import client_http
from distill.client import ServiceTeacher
from distill.config import load_config
from distill.dist import Ranks
from distill.errors import ServiceError
from distill.logit_cache import CacheReader
from distill.pipeline import connect
from distill.records import CaptureSpec, Prompt, SampleRequest, SamplingParams
from distill.split import Split
from distill.store import RunFolder
from distill.tokens import sample_requests
from teachers.engine import TeacherEngine
from teachers.traces import TracesStage

PARAMS = SamplingParams(0.8, 0.95, 50, 30, min_p=0.01)
SPEC = CaptureSpec(20, 1e-3)
COLUMNS = ("offsets_T1", "ids_S", "logprobs_S", "tail_T", "logsumexp_T", "sampled_T")


@pytest.fixture(scope="module")
def single():
    """One row at a time: in a batch, the last bits of a matrix product change with the batch."""
    engine = TeacherEngine(TEACHER, batch_size=1)
    yield engine
    engine.close()


def asked(tokenizer, n: int = 2) -> list[SampleRequest]:
    prompts = [Prompt(f"What is {i} + {2 * i + 3}?", str(3 * i + 3), "chain_sum") for i in range(5)]
    return list(sample_requests(tokenizer, prompts, n, 0))


def table(samples) -> dict:
    return {(s.key, s.sample_index): s for s in samples}


def test_samples_and_scores_through_the_service_are_the_engines_bit_for_bit(single):
    requests = asked(single.tokenizer)
    wanted = table(single.sample(requests, PARAMS, SPEC))
    pairs = [(r.prompt_ids, wanted[r.key, r.sample_index].completion_ids) for r in requests]
    scores = [single.score([pair], SPEC)[0] for pair in pairs]
    with serving(single) as world:
        client = ServiceTeacher(world.url, str(TEACHER), concurrency=4)
        found = table(client.sample(requests, PARAMS, SPEC))
        scored = [client.score([pair], SPEC)[0] for pair in pairs]
        assert (client.fingerprint, client.vocab_size, client.stop_ids) == (
            single.fingerprint,
            single.vocab_size,
            single.stop_ids,
        )
        text = [client.decode(found[r.key, r.sample_index].completion_ids) for r in requests]
        assert client.limitations(SPEC) == [] and client.dtype == "float32"
        client.close()
    assert text == [single.decode(wanted[r.key, r.sample_index].completion_ids) for r in requests]
    for cell, sample in wanted.items():
        ours = found[cell]
        assert (ours.completion_ids, ours.finish_reason, ours.seed) == (
            sample.completion_ids,
            sample.finish_reason,
            sample.seed,
        )
        for name in COLUMNS:
            assert np.array_equal(getattr(ours.dists, name), getattr(sample.dists, name)), name
            assert getattr(ours.dists, name).dtype == getattr(sample.dists, name).dtype
    for ours, theirs in zip(scored, scores):
        assert all(np.array_equal(getattr(ours, name), getattr(theirs, name)) for name in COLUMNS)


def small_config(tmp_path, **teacher):
    source = {"kind": "reasoning_gym", "families": {"chain_sum": 6}, "levels": [1]}
    sampling = {"n": 2, "temperature": 0.6, "top_p": 0.95, "max_new_tokens": 40}
    content = {
        "run": {"name": "x", "dir": str(tmp_path / "runs")},
        "prompts": {"train": [source], "eval": [source | {"seed": 1}]},
        "teacher": {"path": str(TEACHER), "batch_size": 4, "sampling": sampling, **teacher},
        "students": [{"name": "s", "path": str(TEACHER), "loss": {"kind": "response"}}],
        "train": {"max_seq_tokens": 512, "micro_batch_tokens": 512, "batch_tokens": 512},
        "traces": {"shard_prompts": 2, "verify": False},
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(content))
    return load_config(path)


def traces(config, name: str, engine) -> dict[str, bytes]:
    """The data files of a whole traces stage."""
    folder = RunFolder(config.run.dir, name, commit="test", rank=0)
    stages = [folder.stage(each) for each in ("traces", "logits")]
    for stage in stages:
        stage.open({"spec": 1}, {})
    prompts = [Prompt(f"What is {i} + 4?", str(i + 4), "chain_sum") for i in range(5)]
    TracesStage(config, *stages, Ranks(0, 1, 0, torch.device("cpu")), lambda: engine, Split()).run(prompts)
    return {file.name: file.read_bytes() for s in stages for file in s.path.iterdir() if file.suffix != ".json"}


@pytest.mark.parametrize("capture", [{}, {"k_max": 2, "tail_bound": 0.0, "tail_draws": 3}])
def test_a_traces_stage_through_the_service_writes_the_same_bytes(single, tmp_path, capture):
    config = small_config(tmp_path, capture=capture)
    wanted = traces(config, "in-process", single)
    assert sorted(wanted) == [f"traces-0000{i}.{kind}" for i in range(3) for kind in ("cache", "parquet")]
    with CacheReader(next((tmp_path / "runs" / "in-process").rglob("*.cache"))) as cache:
        dists = cache[cache.keys()[0]]
        assert cache.header.tail_draws == config.teacher.capture.tail_draws
        assert (dists.tail_T == 0).all() == bool(capture)  # what is not stored is drawn, or it has a mass
    with serving(single) as world:
        client = connect(small_config(tmp_path, url=world.url, capture=capture))
        assert traces(config, "service", client) == wanted
        client.close()


def test_a_service_of_another_tokenizer_token_or_dtype_is_refused(single, tmp_path, monkeypatch):
    monkeypatch.setattr(client_http, "MEETING_S", 0.2)
    with serving(single, TOKEN) as world:
        with pytest.raises(ServiceError, match="401") as error:
            connect(small_config(tmp_path, url=world.url))
        assert "token_env" in error.value.remedy
        monkeypatch.setenv("THE_TOKEN", TOKEN)
        client = connect(small_config(tmp_path, url=world.url, token_env="THE_TOKEN"))
        assert client.fingerprint == single.fingerprint
        with pytest.raises(ServiceError, match="computes in float32"):
            connect(small_config(tmp_path, url=world.url, token_env="THE_TOKEN", dtype="bfloat16"))
        other = ServiceTeacher(world.url, str(TEACHER.parent / "student-llama"), token=TOKEN)
        with pytest.raises(ServiceError, match="fingerprint") as error:
            other.sample([], PARAMS)
        assert "teacher.path" in error.value.remedy


def test_a_limit_of_the_service_is_an_error_that_names_it(single):
    with serving(single, max_tokens=20, max_top_logprobs=8) as world:
        client = ServiceTeacher(world.url, str(TEACHER))
        requests = asked(single.tokenizer, 1)
        with pytest.raises(ServiceError, match=r"serve\.max_tokens"):
            list(client.sample(requests, PARAMS))
        with pytest.raises(ServiceError, match=r"serve\.max_top_logprobs"):
            list(client.sample(requests, SamplingParams(max_new_tokens=4), SPEC))


def suppressed(samples) -> None:
    with pytest.raises(RuntimeError, match="closed"):
        next(samples)


def test_a_consumer_that_stops_early_frees_the_rows_of_the_service(bundled):
    with serving(bundled) as world:
        client = ServiceTeacher(world.url, str(TEACHER), concurrency=8)
        hot = SamplingParams(3.0, 1.0, 0, 1500)
        samples = client.sample([SampleRequest(str(i), 0, (5, 6), i) for i in range(30)], hot)
        quick = client.sample([SampleRequest("q", 0, (5, 6), 1)], SamplingParams(1.0, 1.0, 0, 2))
        assert next(quick).key == "q"
        worker = iter(samples)
        thread = threading.Thread(target=lambda: suppressed(worker), daemon=True)
        thread.start()
        until(lambda: world.desk.outstanding == 8, "they run")
        client.close()
        until(lambda: world.desk.outstanding == 0, "the rows are free")
        thread.join(10)
        assert not thread.is_alive()
