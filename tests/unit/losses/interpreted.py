"""The Triton kernels on CPU tensors, in Triton's interpreter, on random cases of test_fused against float64 autograd.

Run by test_kernels.py in a process of its own: TRITON_INTERPRET must be set before the kernels are imported.
"""

import sys

import torch
from hypothesis import HealthCheck, given, settings
from test_fused import CASES, LossMetrics

from distill.losses import fused, kernels, stash
from distill.losses.divergence import LOG_TINY

EXAMPLES, COLUMNS = int(sys.argv[1]), int(sys.argv[2])


def check(case) -> None:
    """Value, gradients and metrics of the kernels against float64: autograd's for the first two, torch's for those."""
    value, grads = case.expected()
    size = 1 + value.abs() + max(g.abs().max() for g in grads)
    exact = case.ours(torch.float64)[2].as_tensor()
    found_value, found_grads, metrics = case.ours(torch.float32)
    assert (found_value - value).abs() <= 2e-5 * size
    for found, expected in zip(found_grads, grads):
        assert (found - expected).abs().max() <= 2e-5 * size
    torch.testing.assert_close(metrics.as_tensor(), exact, rtol=1e-4, atol=1e-4 * abs(LOG_TINY))


stash.BLOCK = COLUMNS  # several slices, and several turns of a kernel's loop, at a vocabulary of nine
kernels.STATS_SIZE = kernels.GRAD_SIZE = COLUMNS
assert fused.has_triton() and LossMetrics
settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))(given(CASES)(check))()
print("equal")
