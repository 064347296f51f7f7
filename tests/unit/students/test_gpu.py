"""What only a GPU does: the variable-length attention kernel, bfloat16 steps, the optimizer's state in host memory."""

import pytest
import torch
import torch.nn.functional as F
from student_world import settings

from distill.config_geometry import Geometry
from distill.dist import init_ranks
from distill.store import RunFolder
from students.attention import packed_attention, running_ends
from students.data import load_traces
from students.engine import StudentEngine
from students.metrics import Speed
from students.model import load_student
from students.packing import TrainPlan
from students.step import LossSettings, StudentStep

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def test_the_peak_memory_is_that_of_the_training_and_not_of_what_ran_before():
    torch.empty(2 << 30, dtype=torch.uint8, device="cuda")
    geometry = Geometry(family="llama", hidden_size=64, layers=2, heads=4, intermediate_size=128, vocab_size=100)
    plan = TrainPlan(["a"], [10], [5], row_tokens=40, batch_tokens=40, epochs=1, seed=0)
    speed = Speed(plan, geometry, torch.bfloat16, torch.device("cuda", 0), 1)
    assert speed.row(10, 1.0, 0.0)["memory_gib"] < 1.5


def test_the_kernel_equals_attention_on_each_trace_alone():
    lengths = [7, 130, 1, 64]
    options = {"device": "cuda", "dtype": torch.bfloat16, "requires_grad": True}
    query, key, value = (torch.randn(1, heads, sum(lengths), 64, **options) for heads in (8, 2, 2))
    ends = running_ends(lengths)
    packed = {"seq_ends": ends, "device_ends": ends.to("cuda")}
    found, _ = packed_attention(None, query, key, value, None, **packed, scaling=0.1)
    upstream = torch.randn_like(found)
    gradients = torch.autograd.grad(found, (query, key, value), upstream)
    wide = [x.detach().double().requires_grad_() for x in (query, key, value)]
    parts = zip(*(x.split(lengths, 2) for x in wide))
    alone = [F.scaled_dot_product_attention(*part, is_causal=True, scale=0.1, enable_gqa=True) for part in parts]
    expected = torch.cat(alone, 2).transpose(1, 2)
    assert (found - expected).abs().max() < 0.02
    for found_gradient, want in zip(gradients, torch.autograd.grad(expected, wide, upstream.double())):
        assert (found_gradient - want).abs().max() < 0.02 * want.abs().max()


@pytest.mark.parametrize("stage, offload", [(0, "none"), (1, "none"), (2, "cpu"), (3, "none"), (3, "cpu")])
def test_bfloat16_steps_on_a_gpu_follow_float32_steps_on_it(world, tmp_path, stage, offload):
    ranks = init_ranks("cuda")
    losses = {}
    for dtype in (torch.float32, torch.bfloat16):
        model, tokenizer = load_student(world / "model", dtype)
        run = RunFolder(world, "run", commit="test")
        data = load_traces(run.stage("traces"), run.stage("logits"), tokenizer, 96)
        train = settings(world / "model", zero_stage=stage, offload=offload).train
        module = StudentStep(model, LossSettings(alpha=0.5))
        engine = StudentEngine(module, train, ranks, dtype=dtype, micro_batches=1, offload_dir=tmp_path)
        batch = data.collate([[0, 1, 2, 3]], 400)
        steps = []
        for _ in range(20):
            steps.append(float(engine.accumulate(batch, float(len(batch.labels_M)), last=True)[0]))
            engine.step(3e-3)
        losses[dtype] = steps
        engine.close()
    wide, narrow = losses[torch.float32], losses[torch.bfloat16]
    assert wide[-1] < wide[0] - 1
    assert narrow == pytest.approx(wide, rel=0.05)
