"""One training, however it is split over ranks, ZeRO stages and micro-batches, has one curve of losses."""

import json
from itertools import product

import pytest
import torch
from training_worlds import same_losses
from transformers import AutoModelForCausalLM

from benchmarks.compare_losses import compare, read_log

pytestmark = [pytest.mark.timeout(900), pytest.mark.slow]  # the default suite has two ranks in test_train

# (ranks, ZeRO stage, rows of a micro-batch); a step has four rows
SPLITS = list(product((1, 2, 4), (1, 2, 3), (1, 2, 4)))
SHARED_ROWS = [(2, 1, 2, 1), (2, 3, 2, 2), (4, 2, 2, 1)]  # and ranks that share a row


@pytest.fixture(scope="module")
def expected(trainings, world, tmp_path_factory):
    """The reference: one rank, whole steps, ZeRO off."""
    out = tmp_path_factory.mktemp("reference")
    trainings(world, out, train={"zero_stage": 0}).ok()
    return out


@pytest.mark.parametrize(("ranks", "stage", "rows"), SPLITS)
def test_losses_are_the_same_for_any_ranks_stage_and_split(trainings, world, expected, tmp_path, ranks, stage, rows):
    trainings(world, tmp_path, ranks=ranks, train={"zero_stage": stage, "micro_batch_tokens": 96 * rows}).ok()
    same_losses(tmp_path, expected)


@pytest.mark.parametrize(("ranks", "stage", "sharing", "rows"), SHARED_ROWS)
def test_losses_are_the_same_when_ranks_share_rows(trainings, world, expected, tmp_path, ranks, stage, sharing, rows):
    changes = {"zero_stage": stage, "micro_batch_tokens": 96 * rows, "sequence_parallel": sharing}
    trainings(world, tmp_path, ranks=ranks, train=changes).ok()
    same_losses(tmp_path, expected)


def test_two_ranks_export_in_shards_what_one_exports_in_one_file(trainings, world, expected, tmp_path):
    trainings(world, tmp_path, ranks=2, train={"zero_stage": 3, "micro_batch_tokens": 192}, shard_bytes=20_000).ok()
    index = json.loads((tmp_path / "model" / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in (tmp_path / "model").glob("*.safetensors"))
    assert len(files) > 3 and set(index["weight_map"].values()) == set(files)
    sharded, whole = (AutoModelForCausalLM.from_pretrained(each / "model") for each in (tmp_path, expected))
    ids = torch.arange(40)[None] * 7 % 300
    with torch.no_grad():
        assert (sharded(ids).logits - whole(ids).logits).abs().max() < 1e-3  # two trainings that differ by rounding


def test_another_learning_rate_has_other_losses(trainings, world, expected, tmp_path):
    """The tolerance is small enough to see a change of a thousandth in a setting."""
    trainings(world, tmp_path, train={"zero_stage": 0, "lr": 3.003e-3}).ok()
    found = compare(read_log(tmp_path / "log.jsonl"), read_log(expected / "log.jsonl"))
    assert found.first is not None and found.first.step > 1  # the first step is taken before any update
