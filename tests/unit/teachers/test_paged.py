"""Pages: nothing is handed out twice, nothing is lost, and shared pages live as long as their last holder."""

import random

import pytest
import torch

from distill.errors import CapacityError
from teachers.paged import PagePool, pages_that_fit


def pool(pages: int, layers: int = 2, page_tokens: int = 4) -> PagePool:
    return PagePool(layers, pages, 6, dtype=torch.float32, device=torch.device("cpu"), page_tokens=page_tokens)


def test_random_takes_shares_and_returns_keep_the_books_straight():
    rng, pages = random.Random(0), pool(41)
    held: list[list[int]] = []
    for _ in range(3000):
        choice = rng.random()
        if choice < 0.4 and pages.free:
            new = pages.take(rng.randint(1, min(5, pages.free)))
            assert 0 not in new and not set(new) & {page for one in held for page in one}
            held.append(new)
        elif choice < 0.6 and held:
            held.append(pages.share(rng.choice(held)))
        elif held:
            pages.give_back(held.pop(rng.randrange(len(held))))
        in_use = {page for one in held for page in one}
        assert pages.free == pages.capacity - len(in_use)
        for page in in_use:
            assert pages.holders[page] == sum(page in one for one in held)


def test_what_is_not_held_can_neither_be_shared_nor_given_back():
    pages = pool(5)
    first = pages.take(2)
    pages.give_back(first)
    for misuse in (pages.share, pages.give_back):
        with pytest.raises(ValueError, match="page"):
            misuse(first)
    one = pages.take(1)
    with pytest.raises(ValueError, match="twice"):
        pages.give_back(one * 2)


def test_an_empty_pool_says_so():
    pages = pool(4)
    pages.take(3)
    with pytest.raises(CapacityError, match="0 of 1"):
        pages.take(1)
    with pytest.raises(CapacityError, match="no memory"):
        pool(1)


def test_slots_follow_the_pages_in_order():
    pages = pool(9)
    assert pages.slots([7, 2, 5], 0, 12).tolist() == [28, 29, 30, 31, 8, 9, 10, 11, 20, 21, 22, 23]
    assert pages.slots([7, 2, 5], 3, 9).tolist() == [31, 8, 9, 10, 11, 20]
    assert [pages.pages_for(tokens) for tokens in (0, 1, 4, 5)] == [0, 1, 1, 2]


def test_copies_are_of_all_layers_and_of_nothing_else():
    pages = pool(6)
    pages.states.normal_()
    before = pages.states.clone()
    pages.copy([1, 2], [4, 5])
    assert torch.equal(pages.states[:, 4:], before[:, 1:3]) and torch.equal(pages.states[:, :4], before[:, :4])


def test_sizes_in_bytes():
    # 27 layers of 576 bfloat16 numbers: 31,104 bytes a token, of which 64 make a page.
    pages = PagePool(27, 2, 576, dtype=torch.bfloat16, device=torch.device("cpu"), page_tokens=64)
    assert pages.bytes_per_token == 31_104 and pages.states.nbytes == 2 * 64 * 31_104
    assert pages_that_fit(10 * 64 * 31_104 + 5, 27, 576, 2, 64) == 10
