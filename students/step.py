"""From a micro-batch to its share of the loss and to sums for the metrics. No optimizer, no ranks, no files.

Shape legend: N input tokens, M trained positions, H hidden size.
"""

from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from transformers import PreTrainedModel

from distill.losses.fused import distill_loss
from students.attention import how_packed
from students.data import Batch
from students.sequence import RowRanks


@dataclass(frozen=True)
class LossSettings:
    """loss = alpha * T^2 * divergence + (1 - alpha) * cross-entropy; alpha 0 needs no teacher distributions."""

    alpha: float = 0.0
    divergence: str = "forward_kl"
    beta: float = 0.5
    temperature: float = 1.0


class LossHead(nn.Module):
    """The language-model head, with the loss computed inside it, so that no logits leave it.

    As the owner of the weight it is what ZeRO-3 gathers the weight for, once a micro-batch; a loss outside would see an
    empty weight. Called without `loss` it is the plain head.
    """

    def __init__(self, head: nn.Linear):
        super().__init__()
        self.weight, self.bias = head.weight, head.bias

    def forward(self, hidden: torch.Tensor, loss: dict | None = None):
        if loss is None:
            return nn.functional.linear(hidden, self.weight, self.bias)
        value, sums = distill_loss(hidden, self.weight, bias_V=self.bias, **loss)
        by_set = [loss["set_losses_S"]] if "set_losses_S" in loss else []
        return value, torch.cat([sums.as_tensor(), *by_set])


class StudentStep(nn.Module):
    """A student and its loss. The model keeps its parameters' names, under "model."."""

    def __init__(self, model: PreTrainedModel, settings: LossSettings, sets: int = 1):
        """sets: how many sets of examples a micro-batch may be mixed of."""
        super().__init__()
        self.sets = sets
        self.row_ranks: RowRanks | None = None  # the engine's, where several ranks share a row
        if not isinstance(model.lm_head, LossHead):
            model.lm_head = LossHead(model.lm_head)
        self.model, self.settings = model, settings

    def forward(self, batch: Batch, normalizer: float) -> tuple[torch.Tensor, torch.Tensor]:
        """(loss scalar, the sums of LossMetrics as one float64 tensor, with the loss of each of several sets behind).

        normalizer: trained tokens of the whole optimizer step, over all micro-batches and ranks; the losses of all of
        them then ADD UP to the loss of the step, and so do their gradients.
        """
        hidden_MH = self.hidden(batch)[batch.trained_M]
        loss = {
            "labels_N": batch.labels_M,
            "targets": batch.targets,
            "alpha": self.settings.alpha if batch.alpha_M is None else batch.alpha_M,
            "divergence": self.settings.divergence,
            "beta": self.settings.beta,
            "temperature": self.settings.temperature,
            "normalizer": normalizer,
        }
        if batch.set_M is not None:
            zeros_S = torch.zeros(self.sets, dtype=torch.float64, device=hidden_MH.device)
            loss |= {"set_N": batch.set_M, "set_losses_S": zeros_S, "weights_N": batch.weight_M}
        if self.row_ranks is not None:
            tokens = self.row_ranks.size * len(batch.input_ids_N)
            loss["add_up_chunks"] = partial(self.row_ranks.add_up, names=tokens)
        return self.model.lm_head(hidden_MH, loss)

    def hidden(self, batch: Batch) -> torch.Tensor:
        """Last hidden states [N, H]. Only the trained ones go on to the head, the widest layer of a student."""
        out = self.model.base_model(
            input_ids=batch.input_ids_N[None],
            position_ids=batch.position_ids_N[None],
            **how_packed(batch.seq_lens, batch.input_ids_N.device, self.model.dtype),
            **({"row_ranks": self.row_ranks} if self.row_ranks else {}),
            use_cache=False,
        )
        return out.last_hidden_state[0]
