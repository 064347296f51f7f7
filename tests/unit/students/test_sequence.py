"""Rows shared by ranks: nothing is lost, doubled or seen by the wrong trace, and the sums are those of whole rows."""

import json
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from launch_sequence import make_batch, make_model

from distill.errors import ConfigError
from students.sequence import RowRanks, key_copies, row_ranks

LAUNCH = Path(__file__).with_name("launch_sequence.py")


@pytest.mark.parametrize("lengths", [[13, 1, 22, 9], [40], [1], [3, 2]], ids=str)
@pytest.mark.parametrize("size", [2, 3, 4, 8])
@pytest.mark.parametrize("kind", ["none", "sparse", "bucketed", "read"])
def test_the_shares_of_a_row_hold_each_of_its_tokens_once(lengths, size, kind):
    batch = make_batch(lengths, kind)
    shares = [RowRanks(size, place, "").share(batch) for place in range(size)]
    each = {len(share.input_ids_N) for share in shares}
    assert len(each) == 1  # the all-to-all needs the same number everywhere
    tokens, filling = sum(lengths), size * each.pop() - sum(lengths)
    assert 0 <= filling < size
    for name in ("input_ids_N", "position_ids_N"):
        joined = torch.cat([getattr(share, name) for share in shares])
        assert torch.equal(joined[:tokens], getattr(batch, name)) and len(joined) == tokens + filling
    for place, share in enumerate(shares):
        assert share.seq_lens == lengths + [filling] * (filling > 0)
        start = place * len(share.input_ids_N)
        assert all(0 <= i < len(share.input_ids_N) for i in share.trained_M.tolist())
        wanted = [n for n, at in enumerate(batch.trained_M.tolist()) if start <= at < start + len(share.input_ids_N)]
        assert torch.equal(share.trained_M + start, batch.trained_M[wanted])
        assert torch.equal(share.labels_M, batch.labels_M[wanted])
        if kind != "none":
            assert torch.equal(share.targets.ids_NK, batch.targets.ids_NK[wanted])
            assert torch.equal(share.targets.tail_N, batch.targets.tail_N[wanted])
    assert sum(len(share.labels_M) for share in shares) == len(batch.labels_M)
    if kind == "read":  # the same chunks, by numbers that are the same on all ranks and for which there is room
        found, given = torch.cat([share.targets.chunk_N for share in shares]).tolist(), batch.targets.chunk_N.tolist()
        assert all(-1 <= number < tokens + filling for number in found)
        assert [number < 0 for number in found] == [number < 0 for number in given]
        assert len(set(zip(found, given))) == len(set(found)) == len(set(given))


@pytest.mark.parametrize(
    "heads, kv_heads, ranks, copies", [(16, 8, 2, 1), (16, 8, 8, 1), (16, 8, 16, 2), (28, 4, 2, 1), (28, 4, 7, 7),
                                       (28, 4, 14, 7), (32, 1, 8, 8), (12, 3, 4, 4), (12, 3, 2, 2)]
)  # fmt: skip
def test_key_value_heads_are_repeated_no_more_than_needed(heads, kv_heads, ranks, copies):
    found = key_copies(heads, kv_heads, ranks)
    assert found == copies and kv_heads * found % ranks == 0 and heads % (kv_heads * found) == 0
    each, served = heads // ranks, heads // (kv_heads * found)
    for head in range(heads):  # the key-value head of a query head, in a whole row and on the query head's rank
        rank, local = divmod(head, each)
        own = rank * (kv_heads * found // ranks) + local // served
        assert own // found == head // (heads // kv_heads)


def test_a_size_that_does_not_divide_is_refused_with_those_that_do(ranks):
    config = make_model("qwen3", 4, 2).config
    assert row_ranks(ranks, 1, config) is None
    with pytest.raises(ConfigError, match=r"train.sequence_parallel: it does not divide 1 rank .*2.*Use one of 1\."):
        row_ranks(ranks, 2, config)
    twelve = replace(ranks, world=12)
    with pytest.raises(ConfigError, match=r"does not divide the student's 4 attention heads .*3.*Use one of 1, 2, 4\."):
        row_ranks(twelve, 3, config)


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_losses_and_gradients_are_those_of_whole_rows(world, tmp_path):
    """Packed rows, rows shorter than the ranks are many, grouped heads fewer than ranks, bucketed targets, and chunks
    of text that reach over several ranks."""
    out = tmp_path / "found.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world}", str(LAUNCH)]
    done = subprocess.run([*command, str(out), str(random.randrange(10**6))], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(out.read_text())
    assert len(found) == {2: 3, 4: 9}[world]
    for case, differences in found.items():
        assert len(differences) > 20 and max(differences.values()) < 1e-10, (case, max(differences.items(), key=str))
