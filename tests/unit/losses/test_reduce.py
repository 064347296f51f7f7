"""Laws of the reduction: one division by the global count, whatever the split; ignored tokens are not there."""

import pytest
import torch

from distill.errors import DataError
from distill.losses.reduce import reduce_tokens, valid_tokens


def test_sum_of_unequal_micro_batches_is_the_mean_over_all_valid_tokens():
    loss = torch.tensor([1.0, 2.0, 3.0, 40.0, 50.0])
    labels = torch.tensor([7, -100, 7, 7, -100])
    total = sum(reduce_tokens(loss[part], labels[part], 3) for part in (slice(0, 1), slice(1, 5)))
    assert total.item() == pytest.approx((1 + 3 + 40) / 3)
    assert valid_tokens(labels) == 3


def test_weights_scale_their_tokens_and_do_not_enter_the_normalizer():
    loss, labels = torch.tensor([1.0, 2.0]), torch.tensor([0, 0])
    assert reduce_tokens(loss, labels, 2, torch.tensor([0.5, 3.0])).item() == pytest.approx((0.5 + 6.0) / 2)


def test_nan_of_an_ignored_token_reaches_neither_value_nor_gradient():
    loss = torch.tensor([2.0, float("nan")], requires_grad=True)
    value = reduce_tokens(loss, torch.tensor([1, -100]), 4, torch.tensor([1.0, float("nan")]))
    value.backward()
    assert value.item() == 0.5
    assert loss.grad.tolist() == [0.25, 0.0]


def test_all_ignored_gives_zero_with_a_graph():
    loss = torch.tensor([2.0, 3.0], requires_grad=True)
    for normalizer in (0, 5):
        value = reduce_tokens(loss, torch.tensor([-100, -100]), normalizer)
        value.backward()
        assert value.item() == 0
    assert loss.grad.tolist() == [0, 0]


@pytest.mark.parametrize("normalizer", [0, -1, float("nan"), float("inf")])
def test_normalizer_that_cannot_be_right_is_refused(normalizer):
    with pytest.raises(DataError, match="global number of valid tokens"):
        reduce_tokens(torch.ones(2), torch.tensor([1, -100]), normalizer)
