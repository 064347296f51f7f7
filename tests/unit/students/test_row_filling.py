"""Tokens put behind a single trace so that its length is one of few: they change nothing that is looked at."""

import pytest
import torch

from students.attention import filling_of, how_packed, packed_attention


@pytest.mark.parametrize("tokens", [1, 100, 129])
def test_filling_changes_neither_output_nor_gradient(tokens):
    def result(filling: int) -> list[torch.Tensor]:
        torch.manual_seed(tokens)
        inputs = [torch.randn(1, heads, tokens, 8, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2)]
        found, _ = packed_attention(None, *inputs, None, scaling=0.3, filling=filling)
        upstream = torch.randn(found.shape, dtype=torch.float64)
        return [found, *torch.autograd.grad(found, inputs, upstream)]

    for plain, filled in zip(result(0), result(37)):
        assert plain.shape == filled.shape and torch.allclose(plain, filled, rtol=1e-12, atol=1e-14)


def test_few_lengths_are_left_and_little_is_added():
    lengths = [tokens + filling_of(tokens) for tokens in range(1, 65_537)]
    assert all(0 <= added - tokens < max(128, tokens / 16) for tokens, added in enumerate(lengths, start=1))
    for octave in (2048, 4096, 8192, 16_384, 32_768):
        assert len(set(lengths[octave : 2 * octave])) == 16
    assert filling_of(8192) == filling_of(32_768) == 0


def test_only_the_kernel_that_prepares_for_a_length_is_spared():
    assert how_packed([1000], torch.device("cuda"), torch.bfloat16) == {"filling": 24}
    assert how_packed([1000], torch.device("cpu"), torch.bfloat16) == {}
    assert how_packed([1000], torch.device("cuda"), torch.float32) == {}
