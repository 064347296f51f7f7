"""A real vLLM as the teacher, where one is installed: `vllm` on the PATH, or its command in the variable VLLM.

It serves a bundled dense model on the CPU in float32; what it gives is compared with transformers on the same tokens.
"""

import json
import os
import shutil
import signal
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from launches import ROOT, distill, end, free_port, run, small_config, start, write_config
from transformers import AutoModelForCausalLM

from distill.client import ServiceTeacher
from distill.errors import ServiceError
from distill.records import CaptureSpec, SampleRequest, SamplingParams
from distill.tokens import render_prompt

MODEL = ROOT / "teachers" / "tiny" / "student-same"
COMMAND = os.environ.get("VLLM") or shutil.which("vllm")
SPEC = CaptureSpec(k_max=64, tail_bound=1e-3)
pytestmark = [pytest.mark.slow, pytest.mark.skipif(COMMAND is None, reason="vLLM is not installed")]


@contextmanager
def vllm(scratch: Path, *options: str):
    """Its address, until the block ends."""
    port = free_port()
    command = [COMMAND, "serve", str(MODEL), "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32"]
    command += ["--enforce-eager", "--max-model-len", "1024", "--max-num-seqs", "16", *options]
    own = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "HF_HUB_OFFLINE": "1"}
    own |= {"VLLM_NO_USAGE_STATS": "1", "TORCHDYNAMO_DISABLE": "1"}
    scratch.mkdir(exist_ok=True)
    server = start(command, scratch, os.environ | own)
    try:
        url, until_s = f"http://127.0.0.1:{port}", time.monotonic() + 300
        while not answers(url):
            assert server.poll() is None and time.monotonic() < until_s, (scratch / "err.txt").read_text()[-2000:]
            time.sleep(1)
        yield url
    finally:
        end(server, signal.SIGTERM)
        server.wait(60)


def answers(url: str) -> bool:
    try:
        urllib.request.urlopen(f"{url}/health", timeout=5).close()
    except OSError:
        return False
    return True


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    with vllm(tmp_path_factory.mktemp("vllm"), "--max-logprobs", "64", "--logprobs-mode", "raw_logprobs") as url:
        yield url


def test_samples_and_scores_are_the_model_s_distributions(url):
    client = ServiceTeacher(url, str(MODEL), patience_s=60)
    asked = [
        SampleRequest(f"{i}", 0, tuple(render_prompt(client.tokenizer, f"What is {i} + 29?")), i) for i in range(16)
    ]
    samples = {s.key: s for s in client.sample(asked, SamplingParams(0.6, 0.95, 0, 48), SPEC)}
    pairs = [(each.prompt_ids, samples[each.key].completion_ids) for each in asked]
    scored = client.score(pairs, SPEC)
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float64)
    assert len(samples) == 16
    for each, (prompt, completion), read in zip(asked, pairs, scored, strict=True):
        with torch.no_grad():
            logp_TV = model(torch.tensor([[*prompt, *completion]])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        for dists in (samples[each.key].dists, read):
            assert dists.sampled_T.tolist() == list(completion)
            for t, (first, last) in enumerate(zip(dists.offsets_T1, dists.offsets_T1[1:])):
                kept = logp_TV[t, torch.from_numpy(dists.ids_S[first:last]).long()]
                assert torch.allclose(kept, torch.from_numpy(dists.logprobs_S[first:last]).double(), atol=2e-4)
                assert abs(1 - kept.exp().sum() - dists.tail_T[t]) < 1e-5


def test_a_whole_run_with_vllm_as_the_teacher(url, tmp_path):
    config = small_config(tmp_path / "runs")
    config["teacher"] |= {"path": str(MODEL), "url": url}
    config["traces"]["verify"] = False  # it answers without reasoning, and not well
    done = run(distill(write_config(tmp_path / "c.yaml", config)), tmp_path).ok()
    assert "report.html" in done.out
    manifest = json.loads((tmp_path / "runs" / "small" / "2-traces" / "manifest.json").read_text())
    assert any("logsumexp" in each for each in manifest["service"]["limitations"]), manifest
    assert not (tmp_path / "network.log").exists()


@pytest.mark.parametrize(
    ("options", "what", "remedy"),
    [
        (["--logprobs-mode", "processed_logprobs", "--max-logprobs", "64"], "change with temperature", "raw_logprobs"),
        (["--logprobs-mode", "raw_logits", "--max-logprobs", "64"], "add up to more than 1", "raw_logprobs"),
        ([], "greater than max allowed", "--max-logprobs 64"),
    ],
)
def test_a_vllm_that_gives_something_else_is_refused_before_anything_is_sampled(tmp_path, options, what, remedy):
    with vllm(tmp_path, *options) as url, pytest.raises(ServiceError, match=what) as error:
        ServiceTeacher(url, str(MODEL), patience_s=60).limitations(SPEC)
    assert remedy in error.value.remedy
