"""Gradients of micro-batches in bfloat16 add up in float32, whatever DeepSpeed's optimizer would do with them."""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch
from launch_sequence import make_batch, make_model

from distill.config import Train
from students.engine import StudentEngine
from students.step import LossSettings, StudentStep


@pytest.fixture
def models():
    """Twice the same model in bfloat16."""
    first, second = (make_model("qwen3", 4, 2).bfloat16() for _ in range(2))
    second.load_state_dict(first.state_dict())
    return first, second


def test_bfloat16_gradients_add_up_in_float32(ranks, models, tmp_path):
    from deepspeed.utils import safe_get_full_grad

    batches = [make_batch(lengths, "none") for lengths in ([13, 20], [31], [5, 6, 7])]
    tokens = float(sum(len(batch.labels_M) for batch in batches))
    alone, expected = StudentStep(models[0], LossSettings()), {}
    for batch in batches:
        alone.zero_grad(set_to_none=True)
        alone(batch, tokens)[0].backward()
        for name, parameter in alone.named_parameters():
            expected[name] = expected.get(name, 0) + parameter.grad.float()

    module = StudentStep(models[1], LossSettings())
    options = {"dtype": torch.bfloat16, "micro_batches": len(batches), "offload_dir": tmp_path}
    engine = StudentEngine(module, Train(zero_stage=1, clip_norm=0.0), ranks, **options)
    for _ in range(2):  # nothing of a step is left in the next
        for i, batch in enumerate(batches):
            engine.accumulate(batch, tokens, last=i + 1 == len(batches))
        for name, parameter in engine.module.named_parameters():
            assert torch.equal(safe_get_full_grad(parameter), expected[name]), name
        norm = torch.stack([gradient.norm() for gradient in expected.values()]).norm()
        assert engine.step(0.0) == pytest.approx(float(norm), rel=1e-5)
    engine.close()


KERNEL = """
import torch
from students import sums
device = "cuda" if torch.cuda.is_available() else "cpu"
for count in (1, sums.SIZE, 3 * sums.SIZE + 5):
    total, part = torch.randn(count + 3, device=device), torch.randn(count, device=device).bfloat16()
    expected, inner = total.clone(), total[1 : count + 1]
    expected[1 : count + 1] += part
    sums.add(inner, part)
    assert torch.equal(total, expected), count
print("equal")
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton, which has wheels for Linux alone")
def test_the_kernel_adds_bit_for_bit_and_touches_nothing_else():
    environment = os.environ | ({} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"})
    done = subprocess.run([sys.executable, "-c", KERNEL], env=environment, capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == "equal", done.stderr[-4000:]
