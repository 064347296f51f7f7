"""DistillKit's two recommended layouts of a cached distribution, packed and unpacked as its documentation lays out.

k token ids of ceil(log2 V) bits, the largest `exact` log-probabilities in bfloat16, and float32 coefficients of a least
squares fit of the others by powers and the square root of their place. No tail mass is stored: its loss scales the
stored masses to sum to 1 and takes the student's probabilities as they are.

Shape legend: N tokens, k stored entries, most likely first, P fitted terms.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    k: int
    exact: int
    powers: tuple[float, ...]  # of the place; 0.5 is the square root

    def bytes_per_token(self, vocab_size: int) -> int:
        """Ids are packed by bits; values follow in whole bytes."""
        id_bits = (vocab_size - 1).bit_length()
        return -(-self.k * id_bits // 8) + 2 * self.exact + 4 * len(self.powers)

    def stored(self, logprobs_Nk: Tensor) -> Tensor:
        """float32 [N, k]: the log-probabilities that come back."""
        exact_NE = logprobs_Nk[:, : self.exact].bfloat16().float()
        places = torch.arange(self.k - self.exact, dtype=torch.float64)
        terms_FP = torch.stack([places**power for power in self.powers], 1)
        fitted_NP = (logprobs_Nk[:, self.exact :].double() @ torch.linalg.pinv(terms_FP).T).float()
        return torch.cat([exact_NE, fitted_NP @ terms_FP.float().T], 1)


LAYOUTS = {"top50": Layout(50, 1, (0, 1, 0.5)), "top128": Layout(128, 16, (0, 1, 2, 3, 4, 0.5))}


def divergence_on_support(true_Nk: Tensor, stored_Nk: Tensor) -> np.ndarray:
    """float64 [N]: KL(true || stored), both scaled to sum to 1 over the support; nats."""
    true_Nk, stored_Nk = true_Nk.double().log_softmax(1), stored_Nk.double().log_softmax(1)
    return (true_Nk.exp() * (true_Nk - stored_Nk)).sum(1).numpy()


def loss(stored_Nk: Tensor, student_logprobs_Nk: Tensor) -> np.ndarray:
    """float64 [N]: sum of t log(t / p) over the support, t scaled to sum to 1, p of the whole vocabulary; nats."""
    scaled_Nk = stored_Nk.double().log_softmax(1)
    return (scaled_Nk.exp() * (scaled_Nk - student_logprobs_Nk.double())).sum(1).numpy()
