"""The loss on held-out traces while a student trains: forward passes alone, over all ranks."""

import torch

from distill.errors import ModelError
from students import metrics
from students.data import TraceData
from students.engine import StudentEngine
from students.packing import StepPlan, first_fit_decreasing


class HeldOut:
    """Held-out examples in rows, evaluated in the same micro-batches every time."""

    def __init__(self, data: TraceData, *, row_tokens: int, rows_per_micro_batch: int, vocab_rows: int):
        self.data, self._rows, self._vocab_rows = data, rows_per_micro_batch, vocab_rows
        packed = first_fit_decreasing(data.lengths, row_tokens)
        self._step = StepPlan(0, packed, sum(data.lengths), sum(data.trained))

    def measure(self, engine: StudentEngine) -> dict[str, float]:
        """eval_loss, eval_ce, eval_top1, and eval_kl with distributions: means over the trained tokens of all examples.
        All ranks call it. ModelError when the loss is not finite."""
        batches = self._step.micro_batches(engine.data_rank, engine.data_ranks, self._rows)
        tokens = self._step.trained_tokens
        parts = [engine.evaluate(self.data.collate(rows, self._vocab_rows), tokens) for rows in batches]
        loss, _, *values = engine.add_up(0.0, torch.stack(parts).sum(0))
        if loss != loss or loss in (float("inf"), float("-inf")):
            raise ModelError(
                "the loss on held-out traces is not finite",
                where="train.eval_traces",
                value=loss,
                remedy="Lower train.lr; run again to go on at the last checkpoint.",
            )
        found = metrics.means(metrics.Sums.of(values), tokens, self.data.caches is not None)
        return {"eval_loss": loss, **{f"eval_{name}": found[name] for name in ("ce", "kl", "top1") if name in found}}
