"""The teacher service under load, over loopback: `python -m benchmarks.bench_service`.

Starts teachers/serve.py over the bundled teacher as a process, and asks, in this order:
1. --requests completions of mixed length, settings and kind (streamed or not, with log-probabilities or not) at
   --concurrency: none may be lost, none cut, and a sample of them must equal what the engine draws alone;
2. --hostile malformed or hostile requests: each must get the status it deserves, and the service must go on;
3. every route without the token, and with wrong ones;
4. --disconnects clients that leave in the middle: their rows must be free;
5. SIGTERM under load: what was taken is answered; then SIGKILL of rank 1 of 2: all are told, all ranks end.
"""

import argparse
import asyncio
import json
import os
import platform
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import numpy as np
import yaml

from benchmarks import results_file
from benchmarks.hostile import CASES, send
from distill.commit import commit

ROOT = Path(__file__).parent.parent
READY = re.compile(r"serving \S+ at (http://\S+) \(process (\d+)\)")
TOKEN = "bench-service-token-0123456789"
ROUTES = [("POST", "/v1/completions"), ("POST", "/v1/chat/completions"), ("POST", "/v1/score"), ("GET", "/v1/models"),
          ("GET", "/v1/models/teacher"), ("GET", "/health"), ("GET", "/metrics"), ("GET", "/nothing")]  # fmt: skip
ROWS = results_file.row
HOSTILE_AT_ONCE = 16


@dataclass
class Load:
    """What came of many requests."""

    wall_s: float = 0.0
    seconds: list[float] = field(default_factory=list)
    first_s: list[float] = field(default_factory=list)
    tokens: int = 0
    statuses: Counter = field(default_factory=Counter)
    told: int = 0  # of an error, with a status or inside a stream
    wrong: list[str] = field(default_factory=list)
    drawn: dict[int, list[int]] = field(default_factory=dict)


class Service:
    """teachers/serve.py as a process of its own."""

    def __init__(self, folder: Path, *settings: str, ranks: int = 1, token: bool = False):
        self.log = folder / f"service-{time.monotonic_ns()}.log"
        arguments = ["--config", str(write_config(folder))]
        for setting in ("serve.port=0", *settings, *(["serve.token_env=BENCH_TOKEN"] if token else [])):
            arguments += ["--set", setting]
        command = [sys.executable, "-m", "teachers.serve"]
        if ranks > 1:
            launcher = str(Path(sys.executable).parent / "deepspeed")
            command = [launcher, "--num_accelerators", str(ranks), "--master_port", "29655", "teachers/serve.py"]
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        env = os.environ | {"OMP_NUM_THREADS": "1", "BENCH_TOKEN": TOKEN, "PATH": path}
        with self.log.open("w") as out:
            self.process = subprocess.Popen(
                [*command, *arguments], cwd=ROOT, env=env, stdout=out, stderr=out, start_new_session=True
            )
        while not (found := READY.search(self.text())):
            if self.process.poll() is not None:
                raise SystemExit(f"the service did not start:\n{self.text()}")
            time.sleep(0.1)
        self.url, self.pid = found[1], int(found[2])
        self.http = httpx.Client(base_url=self.url, timeout=120, trust_env=False)

    def text(self) -> str:
        return self.log.read_text()

    def memory_bytes(self, name: str = "VmRSS") -> int:
        return int(re.search(rf"{name}:\s+(\d+)", Path(f"/proc/{self.pid}/status").read_text())[1]) * 1024

    def children(self) -> list[int]:
        """Process ids of the ranks, in order."""
        found = subprocess.run(["ps", "-eo", "pid,pgid,args"], capture_output=True, text=True).stdout
        rows = [line.split(None, 2) for line in found.splitlines()[1:]]
        mine = [(re.search(r"--local_rank=(\d+)", row[2]), row) for row in rows if int(row[1]) == self.process.pid]
        return [pid for _, pid in sorted((int(rank[1]), int(row[0])) for rank, row in mine if rank)]

    def end(self) -> int:
        os.kill(self.pid, signal.SIGTERM)
        return self.process.wait(120)


def write_config(folder: Path) -> Path:
    """The demo's config with the bundled teacher."""
    config = yaml.safe_load((ROOT / "configs" / "demo.yaml").read_text())
    config["hardware"]["device"] = "cpu"
    config["serve"] = {"max_waiting": 4096}
    path = folder / "serve.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def mixed(count: int, seed: int = 0) -> list[dict]:
    """Requests of every kind: prompts of 4 to 400 tokens, budgets of 1 to 160, four ways to draw."""
    rng = random.Random(seed)
    ways = [
        {"temperature": 0},
        {"temperature": 0.6, "top_p": 0.95},
        {"temperature": 1.0},
        {"temperature": 0.8, "top_k": 20},
    ]
    asked = []
    for number in range(count):
        length = int(4 * 100 ** rng.random())
        ids = [rng.randrange(10, 1600) for _ in range(length)]
        content = {"prompt": ids, "max_tokens": int(160 ** rng.random()), "seed": number, "return_token_ids": True}
        content |= rng.choice(ways) | ({"stream": True} if rng.random() < 0.3 else {})
        content |= {"logprobs": rng.choice([0, 5])} if rng.random() < 0.2 else {}
        asked.append(content)
    return asked


async def load(url: str, asked: list[dict], concurrency: int, token: str | None = None) -> Load:
    found, waiting = Load(), list(enumerate(asked))[::-1]
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    limits = httpx.Limits(max_connections=concurrency, max_keepalive_connections=concurrency)

    async def worker(client: httpx.AsyncClient) -> None:
        while waiting:
            number, content = waiting.pop()
            try:
                await one(client, number, content)
            except httpx.HTTPError as error:
                found.wrong.append(f"{number}: {type(error).__name__}")

    async def one(client: httpx.AsyncClient, number: int, content: dict) -> None:
        since_s, ids, usage = time.monotonic(), [], None
        async with client.stream("POST", "/v1/completions", json=content) as answer:
            found.statuses[answer.status_code] += 1
            if content.get("stream") and answer.status_code == 200:
                async for line in answer.aiter_lines():
                    if not line.startswith("data: {"):
                        continue
                    event = json.loads(line[6:])
                    if "error" in event:
                        found.told += 1
                        return
                    if not ids:
                        found.first_s.append(time.monotonic() - since_s)
                    ids += event["choices"][0]["token_ids"]
                usage = len(ids)
            else:
                body = json.loads(await answer.aread())
                if answer.status_code != 200:
                    found.told += "error" in body
                    return
                ids, usage = body["choices"][0]["token_ids"], body["usage"]["completion_tokens"]
        found.seconds.append(time.monotonic() - since_s)
        found.tokens += len(ids)
        if usage != len(ids) or not 0 < len(ids) <= content["max_tokens"]:
            found.wrong.append(f"{number}: {len(ids)} tokens of {content['max_tokens']}, usage {usage}")
        found.drawn[number] = ids

    since_s = time.monotonic()
    async with httpx.AsyncClient(base_url=url, headers=headers, timeout=600, trust_env=False, limits=limits) as client:
        await asyncio.gather(*(worker(client) for _ in range(concurrency)))
    found.wall_s = time.monotonic() - since_s
    return found


def differing(asked: list[dict], drawn: dict[int, list[int]], count: int) -> int:
    """How many of `count` answers are not what the engine draws in this process."""
    import torch

    from distill.records import SampleRequest, SamplingParams
    from teachers.engine import TeacherEngine

    torch.set_num_threads(1)
    engine = TeacherEngine(ROOT / "teachers/tiny/teacher", dtype="float32", batch_size=64)
    wrong = 0
    for number in random.Random(1).sample(sorted(drawn), min(count, len(drawn))):
        content = asked[number]
        params = SamplingParams(
            content["temperature"], content.get("top_p", 1.0), content.get("top_k", 0), content["max_tokens"]
        )
        (sample,) = engine.sample([SampleRequest("", 0, tuple(content["prompt"]), number)], params)
        wrong += sample.completion_ids != drawn[number]
    return wrong


def measure_load(service: Service, args: argparse.Namespace) -> list[dict]:
    asked = mixed(args.requests)
    asyncio.run(load(service.url, mixed(64, seed=9), 64))  # the first steps are slower
    before = service.memory_bytes()
    found = asyncio.run(load(service.url, asked, args.concurrency))
    until_free(service)
    time.sleep(3)  # a service without work gives free memory back
    grown, most = service.memory_bytes() - before, service.memory_bytes("VmHWM") - before
    print(f"load: {dict(found.statuses)}, {found.tokens} tokens in {found.wall_s:.1f} s; wrong: {found.wrong[:3]}")
    p50, p99 = np.percentile(found.seconds, [50, 99])
    first50, first99 = np.percentile(found.first_s, [50, 99])
    return [
        ROWS("requests", args.requests, "requests"),
        ROWS("concurrency", args.concurrency, "requests"),
        ROWS("lost", args.requests - len(found.drawn) + len(found.wrong), "requests", goal="<= 0"),
        ROWS("differ_from_engine", differing(asked, found.drawn, args.compared), "requests", goal="<= 0"),
        ROWS("compared_with_engine", min(args.compared, args.requests), "requests"),
        ROWS("latency_p50", round(p50, 3), "s"),
        ROWS("latency_p99", round(p99, 3), "s"),
        ROWS("first_token_p50", round(first50, 3), "s"),
        ROWS("first_token_p99", round(first99, 3), "s"),
        ROWS("completion_tokens_per_s", round(found.tokens / found.wall_s, 1), "tokens/s"),
        ROWS("prompt_tokens_per_s", round(sum(len(a["prompt"]) for a in asked) / found.wall_s, 1), "tokens/s"),
        ROWS("requests_per_s", round(args.requests / found.wall_s, 2), "requests/s"),
        ROWS("memory_growth", round(grown / 2**20, 1), "MiB"),
        ROWS("memory_growth_at_most", round(most / 2**20, 1), "MiB"),
    ]


def until_free(service: Service) -> float:
    """Seconds until no row is left, 60 at most."""
    since_s = time.monotonic()
    while (health := service.http.get("/health").json())["running"] + health["waiting"]:
        if time.monotonic() - since_s > 60:
            break
        time.sleep(0.05)
    return time.monotonic() - since_s


def measure_hostile(service: Service, args: argparse.Namespace) -> list[dict]:
    wrong, since_s, before = Counter(), time.monotonic(), service.memory_bytes()

    def one(number: int) -> None:
        case = CASES[number % len(CASES)]
        status = send(service.url, case, random.Random(number))
        if status not in case.statuses:
            wrong[f"{case.name}: {status}"] += 1

    with ThreadPoolExecutor(HOSTILE_AT_ONCE) as pool:
        list(pool.map(one, range(args.hostile)))
    wall_s = time.monotonic() - since_s
    until_free(service)
    health = service.http.get("/health").json()
    print(f"hostile: {args.hostile} in {wall_s:.1f} s; wrong: {dict(wrong)}; then {health}")
    good = service.http.post("/v1/completions", json={"prompt": "1 + 1", "max_tokens": 4})
    return [
        ROWS("hostile_requests", args.hostile, "requests"),
        ROWS("hostile_kinds", len(CASES), "kinds"),
        ROWS("hostile_wrong_status", sum(wrong.values()), "requests", goal="<= 0"),
        ROWS("hostile_rows_left", health["running"] + health["waiting"], "sequences", goal="<= 0"),
        ROWS("hostile_then_answers", int(good.status_code == 200), "requests", goal=">= 1"),
        ROWS("hostile_memory_growth", round((service.memory_bytes() - before) / 2**20, 1), "MiB"),
    ]


def measure_tokens(service: Service) -> list[dict]:
    wrong = 0
    given = [None, "", "Bearer", f"Bearer {TOKEN}x", f"Bearer {TOKEN[:-1]}", f"Basic {TOKEN}", TOKEN]
    for method, path in ROUTES:
        for value in given:
            headers = {} if value is None else {"Authorization": value}
            answer = service.http.request(method, path, headers=headers, content=b"{}" if method == "POST" else b"")
            wrong += answer.status_code != 401
        answer = service.http.request(method, path, headers={"Authorization": f"Bearer {TOKEN}"})
        wrong += answer.status_code == 401
    told = TOKEN in service.text()
    print(f"unauthorised: {len(ROUTES) * len(given)} requests, {wrong} wrong; token in the log: {told}")
    return [
        ROWS("unauthorised_requests", len(ROUTES) * len(given), "requests"),
        ROWS("unauthorised_answered", wrong + told, "requests", goal="<= 0"),
    ]


async def leave(url: str, count: int) -> None:
    """Clients that ask for long answers and leave after a moment."""
    host, port = url.removeprefix("http://").split(":")
    rng = random.Random(3)

    async def one(number: int) -> None:
        content = {"prompt": [5, 6, 7], "max_tokens": 1000, "temperature": 3.0, "n": 2, "stream": number % 2 == 0}
        body = json.dumps(content).encode()
        _, writer = await asyncio.open_connection(host, int(port))
        head = f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(body)}\r\n\r\n"
        writer.write(head.encode() + body)
        await writer.drain()
        await asyncio.sleep(rng.uniform(0, 2))
        writer.transport.abort() if number % 3 else writer.close()

    for first in range(0, count, 100):
        await asyncio.gather(*(one(number) for number in range(first, min(count, first + 100))))


def measure_disconnects(service: Service, args: argparse.Namespace) -> list[dict]:
    asyncio.run(leave(service.url, args.disconnects))
    freed_s = until_free(service)
    health = service.http.get("/health").json()
    print(f"disconnects: {args.disconnects}; all rows free {freed_s:.2f} s after the last; {health}")
    return [
        ROWS("disconnects", args.disconnects, "clients"),
        ROWS("disconnects_rows_left", health["running"] + health["waiting"], "sequences", goal="<= 0"),
        ROWS("disconnects_freed", round(freed_s, 2), "s", goal="<= 10"),
    ]


def measure_sigterm(folder: Path, args: argparse.Namespace) -> list[dict]:
    service = Service(folder)

    async def stopped() -> Load:
        running = asyncio.create_task(load(service.url, mixed(600, seed=4), 64))
        while service.http.get("/health").json()["running"] < 32:
            await asyncio.sleep(0.05)
        await asyncio.sleep(2)
        os.kill(service.pid, signal.SIGTERM)
        return await running

    found = asyncio.run(stopped())
    since_s = time.monotonic()
    status = service.process.wait(60)
    refused = Counter(each.partition(": ")[2] for each in found.wrong if "tokens of" not in each)
    cut = [each for each in found.wrong if "tokens of" in each and " 0 tokens" not in each]
    print(f"SIGTERM: {dict(found.statuses)}, then {dict(refused)}; exit status {status}; cut: {cut[:3]}")
    return [
        ROWS("sigterm_answered", len(found.drawn), "requests"),
        ROWS("sigterm_cut", len(cut), "requests", goal="<= 0"),
        ROWS("sigterm_exit_status", status, "status", goal="<= 0"),
        ROWS("sigterm_exit_after_last_answer", round(time.monotonic() - since_s, 1), "s", goal="<= 60"),
    ]


def measure_sigkill(folder: Path) -> list[dict]:
    service = Service(folder, "teacher.batch_size=16", ranks=2)
    victim, since_s = service.children()[1], 0.0

    async def killed() -> Load:
        nonlocal since_s
        running = asyncio.create_task(load(service.url, mixed(400, seed=5), 32))
        while service.http.get("/health").json()["running"] < 24:
            await asyncio.sleep(0.05)
        await asyncio.sleep(2)
        os.kill(victim, signal.SIGKILL)
        since_s = time.monotonic()
        return await running

    found = asyncio.run(killed())
    told_s = time.monotonic() - since_s
    status = service.process.wait(60)
    ended_s = time.monotonic() - since_s
    named = f"rank 1 (process {victim}" in service.text() and "Traceback" in service.text()
    print(
        f"SIGKILL of rank 1: {dict(found.statuses)}; told after {told_s:.1f} s, ended {ended_s:.1f} s, status {status}"
    )
    return [
        ROWS("sigkill_told_of_it", found.told, "requests", goal=">= 1"),
        ROWS("sigkill_last_client_told", round(told_s, 1), "s", goal="<= 60"),
        ROWS("sigkill_job_ended", round(ended_s, 1), "s", goal="<= 60"),
        ROWS("sigkill_named_with_traceback", int(named), "times", goal=">= 1"),
        ROWS("sigkill_ranks_left", len(service.children()), "processes", goal="<= 0"),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--concurrency", type=int, default=256)
    parser.add_argument("--hostile", type=int, default=10_000)
    parser.add_argument("--disconnects", type=int, default=500)
    parser.add_argument("--compared", type=int, default=200, help="answers compared with the engine's")
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        service = Service(folder)
        rows += measure_load(service, args)
        rows += measure_hostile(service, args)
        rows += measure_disconnects(service, args)
        service.end()
        locked = Service(folder, token=True)
        rows += measure_tokens(locked)
        locked.end()
        rows += measure_sigterm(folder, args)
        rows += measure_sigkill(folder)
    for each in rows:
        print(f"{each['name']:32s} {each['value']:>12} {each['unit']:12s} {each.get('goal', '')}")
    device = f"cpu{os.cpu_count()}, {platform.processor() or platform.machine()}"
    question = "Does the service lose, mistake or hang on anything under load, attack, disconnects and signals?"
    print(results_file.write("service", question, rows, device=device, commit=commit()))


if __name__ == "__main__":
    main()
