"""How far losses and gradients of rows shared by ranks are from those of whole rows, in float64: `launch_sequence.py
OUT SEED`, under a launcher. Rank 0 writes OUT: {case: {name: the largest difference over the largest value}}."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parents[3]))  # a launcher starts this file from any folder

from student_world import FAMILIES

from distill.dist import init_ranks
from distill.losses.buckets import BucketedTargets
from distill.losses.sparse import SparseTargets
from students import attention
from students.data import Batch
from students.sequence import row_ranks
from students.step import LossSettings, StudentStep

VOCABULARY = 60


def make_model(family: str, heads: int, kv_heads: int, layers: int = 2):
    config_class, model_class, extra = FAMILIES[family]
    config = config_class(
        vocab_size=VOCABULARY, hidden_size=8 * heads, intermediate_size=40, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, max_position_embeddings=256,
        tie_word_embeddings=family == "qwen3", initializer_range=0.3, **extra,
    )  # fmt: skip
    return model_class._from_config(config, attn_implementation=attention.NAME)


def make_batch(lengths: list[int], kind: str) -> Batch:
    """Traces of random tokens, each trained from a random place on; the last token of none is the first of another.

    No token comes twice: over equal tokens alone attention changes nothing, and its gradients are rounding errors that
    cannot be compared by their own size.
    """
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    trained = [torch.arange(a + int(torch.randint(n, ())), a + n) for a, n in zip(starts, lengths)]
    trained_M = torch.cat(trained)
    labels_M = torch.randint(VOCABULARY, trained_M.shape)
    ids_MK = torch.stack([torch.randperm(VOCABULARY)[:5] for _ in labels_M])
    mass_MK1 = torch.softmax(2 * torch.randn(len(labels_M), 6, dtype=torch.float64), 1)
    targets = None
    if kind == "sparse":
        targets = SparseTargets(ids_MK, mass_MK1[:, :5].log(), mass_MK1[:, 5])
    if kind in ("bucketed", "read"):  # five tokens in three buckets
        group_MK = torch.tensor([0, 0, 1, 2, 2]).expand_as(ids_MK).contiguous()
        targets = BucketedTargets(ids_MK, group_MK, mass_MK1[:, :3].log(), mass_MK1[:, 3:].sum(1))
    if kind == "read":  # some of it by the teacher alone: chunks of some seven tokens, wherever a rank's share ends
        chunk_M = (torch.rand(len(labels_M)) < 0.15).cumsum(0)
        logp_M = torch.rand(len(labels_M) + 1, dtype=torch.float64).log()[chunk_M]
        chunk_M = torch.where(torch.rand(len(labels_M)) < 0.2, -1, 7 * chunk_M + 300)
        targets = replace(targets, drawn_N=torch.rand(len(labels_M)) < 0.5, chunk_N=chunk_M, chunk_logprobs_N=logp_M)
    positions = torch.cat([torch.arange(n) for n in lengths])
    return Batch(torch.randperm(VOCABULARY)[: len(positions)], positions, lengths, trained_M, labels_M, targets, [])


def measured(step: StudentStep, batch: Batch) -> dict[str, torch.Tensor]:
    step.zero_grad()
    loss, sums = step(batch, 37.0)
    loss.backward()
    return {"loss": loss.detach(), "sums": sums, **{name: p.grad.clone() for name, p in step.named_parameters()}}


def main() -> None:
    out, seed = Path(sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(1)
    ranks = init_ranks("cpu", timeout_s=120)
    found = {}
    for number, (family, sizes, size, lengths, kind) in enumerate(
        [
            ("qwen3", (4, 2), 2, [13, 1, 22, 9], "sparse"),
            ("qwen3", (4, 2), 4, [13, 1, 22, 9], "bucketed"),
            ("llama", (8, 8), 4, [3, 30, 4], "sparse"),
            ("qwen2", (12, 3), 4, [40], "none"),
            ("qwen3", (4, 1), 2, [2], "sparse"),  # fewer tokens than ranks: some hold filling alone
            ("qwen3", (4, 1), 4, [1, 2], "bucketed"),
            ("qwen3", (4, 2), 2, [13, 1, 22, 9], "read"),
            ("llama", (4, 4), 4, [40], "read"),
            ("qwen2", (4, 2), 4, [2, 1], "read"),
        ]
    ):
        if size > ranks.world:
            continue
        torch.manual_seed(seed + number)  # the same on every rank
        batch, alpha = make_batch(lengths, kind), 0.7 if kind != "none" else 0.0
        step = StudentStep(make_model(family, *sizes).double(), LossSettings(alpha=alpha))
        expected = measured(step, batch)
        step.row_ranks = row_ranks(ranks, size, step.model.config)
        shared = measured(step, step.row_ranks.share(batch))
        groups = ranks.world // size  # each has computed the same row
        differences = {}
        for name, value in shared.items():
            torch.distributed.all_reduce(value)
            differences[name] = float((value / groups - expected[name]).abs().max() / expected[name].abs().max())
        found[f"{number} {family} {sizes} over {size}"] = differences
    if ranks.is_main:
        out.write_text(json.dumps(found))
    ranks.close()


if __name__ == "__main__":
    main()
