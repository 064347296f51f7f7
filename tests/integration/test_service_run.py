"""The service as a process: the same traces through it, and how it ends when told to, or when a rank is killed."""

import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from launches import contents, distill, environment, finish, numbers, run, small_config, start, write_config
from service_launch import launched

from distill.files import read_json
from distill.logit_cache import CacheReader
from distill.traceset import read_traces

LONG = {"prompt": [5, 6, 7], "max_tokens": 1500, "temperature": 3.0, "n": 16}
DATA = (".parquet", ".cache")
STAGES = "prompts,traces,train,eval"


def tiny_config(run_dir: Path, batch_size: int) -> dict:
    """Twelve prompts in four shards."""
    config = small_config(run_dir)
    config["prompts"]["train"][0] |= {"per_family": 6}
    config["teacher"]["batch_size"] = batch_size
    config["teacher"]["sampling"]["max_new_tokens"] = 80
    config["traces"] = {"verify": False, "shard_prompts": 3}
    config["eval"] |= {"k": 1, "max_new_tokens": 60, "retention": False}
    config["train"] |= {"epochs": 1}
    return config


def sampled(folder: Path) -> dict[str, str]:
    """The data of traces and logits: file -> sha256."""
    found = {
        f"{stage}/{name}": digest
        for stage in ("2-traces", "3-logits")
        for name, digest in contents(folder / stage).items()
    }
    return {name: digest for name, digest in found.items() if name.endswith(DATA)}


def report(folder: Path) -> dict:
    """The run's report, without times and without where the teacher was."""
    found = read_json(folder / "5-eval/report.json", "")
    del found["config"]["teacher"]["url"]
    return numbers(found)


@pytest.fixture(scope="module")
def in_process(tmp_path_factory) -> Path:
    """The run folder of a run with the teacher in its own process, one row at a time."""
    scratch = tmp_path_factory.mktemp("in-process")
    config = write_config(scratch / "c.yaml", tiny_config(scratch / "runs", 1))
    run(distill(config, "--stages", STAGES), scratch).ok()
    return scratch / "runs" / "small"


@pytest.mark.slow
def test_traces_through_the_service_are_those_of_the_engine_to_the_last_byte(in_process, tmp_path):
    # One row at a time on both sides: in a batch, products of matrices differ in their last bits with its size.
    config = write_config(tmp_path / "c.yaml", tiny_config(tmp_path / "runs", 1))
    with launched(config, tmp_path / "service") as service:
        run(distill(config, "--stages", STAGES, "--set", f"teacher.url={service.url}"), tmp_path).ok()
        assert service.http.get("/health").json()["running"] == 0
    found, wanted = sampled(tmp_path / "runs" / "small"), sampled(in_process)
    assert len(wanted) == 8 and found == wanted
    ours, theirs = (report(each) for each in (tmp_path / "runs" / "small", in_process))
    assert ours == theirs
    manifest = read_json(tmp_path / "runs/small/2-traces/manifest.json", "")
    assert manifest["hash"] == read_json(in_process / "2-traces/manifest.json", "")["hash"]
    assert manifest["service"] == {"url": service.url, "limitations": []}
    # The service has ended; what it was needed for is finished, so the rest of the run does not miss it.
    late = run(distill(config, "--stages", "traces", "--set", f"teacher.url={service.url}"), tmp_path).ok()
    assert "is not reached" in late.out and "skipped" in late.out


@pytest.mark.slow
def test_traces_go_on_when_the_service_is_killed_and_started_again(in_process, tmp_path):
    config = write_config(tmp_path / "c.yaml", tiny_config(tmp_path / "runs", 4))
    with launched(config, tmp_path / "first") as service:
        port = service.url.rpartition(":")[2]
        since_s = time.monotonic()
        running = start(
            distill(config, "--stages", "prompts,traces", "--set", f"teacher.url={service.url}"),
            tmp_path,
            environment(tmp_path),
        )
        folder = tmp_path / "runs" / "small"
        while not any((folder / "2-traces").glob("*.parquet.json")):
            assert running.poll() is None, (tmp_path / "err.txt").read_text()
            time.sleep(0.01)
        os.kill(service.rank0, signal.SIGKILL)
    with launched(config, tmp_path / "second", port=int(port)):
        finish(running, tmp_path, since_s).ok()
    for path in sorted((in_process / "2-traces").glob("*.parquet")):
        ours, theirs = (read_traces(each / "2-traces" / path.name) for each in (folder, in_process))
        assert [(t.sample_key, t.completion_ids, t.verdict) for t in ours] == [
            (t.sample_key, t.completion_ids, t.verdict) for t in theirs
        ]
    for path in sorted((in_process / "3-logits").glob("*.cache")):
        with CacheReader(path) as theirs, CacheReader(folder / "3-logits" / path.name) as ours:
            assert ours.keys() == theirs.keys() and ours.header == theirs.header
            for key in ours.keys():  # noqa: SIM118
                assert abs(ours[key].tail_T - theirs[key].tail_T).max() < 1e-5


def test_sigterm_during_load_loses_no_request_that_was_taken(tmp_path):
    config = write_config(tmp_path / "c.yaml", tiny_config(tmp_path / "runs", 16))
    with launched(config, tmp_path / "service") as service, ThreadPoolExecutor(24) as pool:
        stop, answers = threading.Event(), []

        def ask(number: int) -> None:
            while not stop.is_set():
                try:
                    content = {"prompt": [5, number], "max_tokens": 30, "temperature": 1.0}
                    answers.append(service.http.post("/v1/completions", json=content))
                except httpx.TransportError as error:
                    answers.append(error)  # after the last taken request: the door is closed
                    return

        asking = [pool.submit(ask, number) for number in range(24)]
        while sum(isinstance(each, httpx.Response) for each in answers) < 40:
            time.sleep(0.01)
        os.kill(service.rank0, signal.SIGTERM)
        assert service.process.wait(60) == 0, service.err()
        stop.set()
        for each in asking:
            each.result(60)
    taken = [each for each in answers if isinstance(each, httpx.Response)]
    assert len(taken) >= 40 and {each.status_code for each in taken} <= {200, 503}
    assert all(each.json()["choices"][0]["text"] is not None for each in taken if each.status_code == 200)
    broken = [each for each in answers if not isinstance(each, httpx.Response)]
    assert all(isinstance(each, httpx.ConnectError | httpx.RemoteProtocolError | httpx.ReadError) for each in broken)
    assert service.out().rstrip().endswith("the service has ended")


@pytest.mark.slow
@pytest.mark.parametrize(
    "split", [(), ("teacher.tensor_parallel=2",), ("teacher.expert_parallel=2",)], ids=["copies", "tensor", "expert"]
)
def test_two_ranks_answer_as_one_and_end_together_when_one_is_killed(tmp_path, split):
    config = write_config(tmp_path / "c.yaml", tiny_config(tmp_path / "runs", 8))
    asked = [
        {"prompt": [5, 6, i], "max_tokens": 25, "temperature": 0.8, "seed": i, "return_token_ids": True}
        for i in range(24)
    ]

    def ids(service) -> list[list[int]]:
        with ThreadPoolExecutor(24) as pool:
            found = pool.map(lambda content: service.http.post("/v1/completions", json=content).json(), asked)
            return [each["choices"][0]["token_ids"] for each in found]

    with launched(config, tmp_path / "one") as alone:
        expected = ids(alone)
        scored = alone.http.post("/v1/score", json={"sequences": [{"prompt_ids": [5], "completion_ids": [6, 7]}] * 6})
    with (
        launched(config, tmp_path / "two", "hardware.gpus=2", *split, ranks=2) as service,
        ThreadPoolExecutor(2) as pool,
    ):
        assert ids(service) == expected
        again = service.http.post("/v1/score", json={"sequences": [{"prompt_ids": [5], "completion_ids": [6, 7]}] * 6})
        assert [d["ids"] for d in again.json()["data"]] == [d["ids"] for d in scored.json()["data"]]
        waiting = [pool.submit(service.http.post, "/v1/completions", json=LONG) for _ in range(2)]
        while service.http.get("/health").json()["running"] < 8:
            time.sleep(0.05)
        victim, since_s = service.ranks()[1], time.monotonic()
        os.kill(victim, signal.SIGKILL)
        for each in waiting:
            answer = each.result(60)
            assert answer.status_code == 500 and answer.json()["error"]["code"] == "engine_died", answer.text
        assert service.process.wait(60) != 0 and time.monotonic() - since_s < 60
        assert f"rank 1 (process {victim}" in service.err() and "Traceback" in service.err()
        assert service.ranks() == {}
