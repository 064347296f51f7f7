"""How far a student is from its teacher at every position of one completion, whatever their tokenizers.

The teacher's distributions reach the student's tokens through the alignment (distill.align): outcomes are buckets of
student tokens and the rest. Where both have one tokenizer every bucket is one token, and the outcomes are the K stored
tokens and the rest. Either way the divergence of outcomes never overstates that of tokens.

Legend: N positions of one completion in the student's tokens, C of them in a chunk, V vocabulary, K members of buckets,
G outcomes (padded).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from distill.align import Aligner
from distill.align_spans import COVERED, Alignment
from distill.align_tables import PairTables
from distill.align_targets import BucketTargets, pad
from distill.errors import DataError
from distill.losses.buckets import BucketedTargets
from distill.losses.divergence import LOG_ZERO

_CHUNK_TOKENS = 256  # log-probabilities of a 152k vocabulary take 160 MB a chunk in fp32


@dataclass(frozen=True)
class Closeness:
    """The positions of one completion that have a distribution, in order.

    kl_N: KL(teacher || student) in nats. same_N: 1.0 where both find the same outcome most likely. at_N: where in the
    completion's bytes its token begins. bytes_N: bytes of the token. The end token is no text: it has 0 bytes and
    stands where the last byte does.
    """

    kl_N: np.ndarray
    same_N: np.ndarray
    at_N: np.ndarray
    bytes_N: np.ndarray

    def between(self, low: int, high: int | None) -> Closeness:
        """The positions that begin at byte low .. high - 1."""
        inside_N = (self.at_N >= low) & (self.at_N < (np.inf if high is None else high))
        return Closeness(self.kl_N[inside_N], self.same_N[inside_N], self.at_N[inside_N], self.bytes_N[inside_N])


def closeness(
    student_NV: torch.Tensor | np.ndarray, aligner: Aligner, alignment: Alignment, targets: BucketTargets, where: str
) -> Closeness:
    """Of one completion. student_NV: logits or log-probabilities of its tokens. Errors: DataError, naming `where`."""
    kl_N, same_N = divergence(student_NV, targets, aligner.tables, where)
    bytes_N = alignment.lens_N.copy()
    if alignment.teacher_ids_T[-1] in aligner.teacher.stop_ids:
        bytes_N[alignment.teacher_N == len(alignment.teacher_ids_T) - 1] = 0
    covered_N = targets.kind_N <= COVERED
    at_N = np.minimum(np.cumsum(bytes_N) - bytes_N, max(bytes_N.sum() - 1, 0))
    return Closeness(kl_N[covered_N], same_N[covered_N], at_N[covered_N], bytes_N[covered_N])


def divergence(
    student_NV: torch.Tensor | np.ndarray, targets: BucketTargets, tables: PairTables, where: str = ""
) -> tuple[np.ndarray, np.ndarray]:
    """(kl_N in nats, same_N: 1.0 where both find the same outcome most likely), float64.

    kl = sum_G q log(q / p) + R log(R / S): q and p the two masses of an outcome, R and S those of the rest. same: the
    student's mass on the teacher's most likely outcome is no less than on any other, and than any token of the rest.
    student_NV holds logits or log-probabilities, V at least the student's vocabulary. A position without outcomes is 0.
    """
    if len(student_NV) != len(targets):
        found = f"{len(student_NV)} rows for {len(targets)} tokens"
        raise DataError("the student scored another number of tokens than it was given", where=where, value=found)
    if int(tables.members_of(np.unique(targets.roots_E)).max(initial=0)) >= student_NV.shape[-1]:
        raise DataError("a teacher token is outside of the student's vocabulary", where=where)
    parts = [
        _chunk(torch.as_tensor(student_NV[start : start + _CHUNK_TOKENS]), targets, tables, start)
        for start in range(0, len(targets), _CHUNK_TOKENS)
    ]
    kl_N, same_N = (np.concatenate([part[i] for part in parts]) for i in (0, 1))
    if not np.isfinite(kl_N).all():
        at = int(np.flatnonzero(~np.isfinite(kl_N))[0])
        raise DataError("the divergence is not finite", where=f"{where} token {at}", value=float(kl_N[at]))
    return kl_N, same_N


def _chunk(
    student_CV: torch.Tensor, targets: BucketTargets, tables: PairTables, start: int
) -> tuple[np.ndarray, np.ndarray]:
    padded, device = pad(targets.part(start, start + len(student_CV)), tables), student_CV.device
    arrays = (padded.ids_NK, padded.group_NK, padded.logq_NG, padded.tail_N)
    outcomes = BucketedTargets(*(torch.from_numpy(array).to(device) for array in arrays))
    if not outcomes.logprobs_NG.shape[1]:
        return np.zeros(len(student_CV)), np.zeros(len(student_CV))
    # Log-probabilities are logits too, so this is right for either; float32 rows, float64 sums over the outcomes.
    student_CV = student_CV.float().log_softmax(-1)
    members_CK = student_CV.gather(1, outcomes.ids_NK).double().masked_fill(outcomes.padded_NK, -torch.inf)
    student_CG, teacher_CG = outcomes.outcomes(members_CK), outcomes.logprobs_NG.double()
    student_CG = student_CG.masked_fill(student_CG <= LOG_ZERO, -torch.inf)  # a mass of zero must not pass as finite
    gap_CG = torch.where(teacher_CG > -torch.inf, teacher_CG - student_CG, 0)
    kl_C = (teacher_CG.exp() * gap_CG).sum(1)
    # logsumexp over what is in no bucket, not 1 - sum of the buckets: exact however small the mass is.
    row_E, column_E = (~outcomes.padded_NK).nonzero(as_tuple=True)
    student_CV[row_E, outcomes.ids_NK[row_E, column_E]] = -torch.inf
    rest_C, log_rest_C = outcomes.tail_N.double(), student_CV.logsumexp(-1).double()
    open_C = (rest_C > 0) & ((~outcomes.padded_NK).sum(1) < student_CV.shape[-1])
    kl_C[open_C] += rest_C[open_C] * (rest_C[open_C].log() - log_rest_C[open_C])
    best_C1 = torch.maximum(student_CG.amax(1), student_CV.amax(1).double())[:, None]
    same_C = student_CG.gather(1, teacher_CG.argmax(1, keepdim=True)) >= best_C1
    return kl_C.cpu().numpy(), same_C[:, 0].double().cpu().numpy()
