"""A chunk of tokens against K+1 outcomes (sparse.py): loss, metrics, and dL/dlogits.

All the maths of divergence, cross-entropy and z-loss happens in [C, K+1], in torch, on every device. The vocabulary is
seen twice, through two operations that exist in torch (here) and in Triton (kernels.py): reduce what lies outside the
support to three numbers, and write the gradient. Cross-entropy alone is K = 0.

Shape legend: C tokens of a chunk, V vocabulary, K support, K1 = K + 1 outcomes with the rest last.
"""

import torch
from torch import Tensor

from distill.losses.buckets import BucketedTargets
from distill.losses.divergence import LOG_ZERO, log_softmax, tempered_value_and_grad, value_and_logit_grad
from distill.losses.head import Head
from distill.losses.job import Job
from distill.losses.metrics import LossMetrics
from distill.losses.sparse import SparseTargets, mask_support_, teacher_logits
from distill.losses.stash import GradStash


class TorchRest:
    """The two operations in torch. `scratch_CV` becomes the distribution within the rest."""

    def __init__(self, logits_CV: Tensor, scratch_CV: Tensor, targets, labels_C: Tensor, head: Head):
        self.head, self.padded_CK = head, targets.padded_NK
        self.slope_CV = None if head.softcap is None else 1 - (logits_CV / head.softcap).square_()
        self.labels_C1 = labels_C.unsqueeze(1)
        self.label_logit_C1 = logits_CV.gather(1, self.labels_C1)
        self.support_CK, self.ids_CK = mask_support_(logits_CV, targets)
        self.top_C1 = logits_CV.amax(1, keepdim=True)
        self.rest_CV = torch.softmax(logits_CV, 1, out=scratch_CV)
        self.log_C1 = self.top_C1 - self.rest_CV.amax(1, keepdim=True).log()  # the largest q is 1 / sum exp(z - max)
        self.mean_C1 = logits_CV.mul_(self.rest_CV).sum(1, keepdim=True)

    def write_grad(
        self, support_grad_CK: Tensor, rest_grad_C1: Tensor, ce_scale_C1: Tensor, stash: None, first_row: int
    ) -> Tensor:
        """[C, V]: rest_grad times q outside the support, support_grad on it, ce_scale taken off at the label."""
        grad_CV = self.rest_CV.mul_(rest_grad_C1)
        if self.ids_CK.shape[1]:
            grad_CV.scatter_add_(1, self.ids_CK, support_grad_CK.masked_fill(self.padded_CK, 0))
        grad_CV.scatter_add_(1, self.labels_C1, -ce_scale_C1)
        if self.slope_CV is not None:
            grad_CV.mul_(self.slope_CV)
        return grad_CV if self.head.logit_scale == 1.0 else grad_CV.mul_(self.head.logit_scale)


class KernelRest:
    """The two operations in Triton. The logits are the bare product of hidden states and head."""

    def __init__(self, logits_CV: Tensor, scratch_CV: None, targets, labels_C: Tensor, head: Head):
        from distill.losses import kernels  # Triton comes with torch's CUDA builds alone

        self.kernels, self.head, self.logits_CV, self.labels_C = kernels, head, logits_CV, labels_C
        self.ids_CK = targets.ids_NK.masked_fill(targets.padded_NK, -1)
        self.stats = kernels.rest_stats(logits_CV, self.ids_CK, labels_C, head)
        self.support_CK, self.label_logit_C1, self.top_C1, self.log_C1, self.mean_C1 = self.stats

    def write_grad(
        self, support_grad_CK: Tensor, rest_grad_C1: Tensor, ce_scale_C1: Tensor, stash: GradStash, first_row: int
    ) -> None:
        """As TorchRest's, to rows first_row .. of the stash."""
        is_label_CK = self.ids_CK == self.labels_C.unsqueeze(1)
        label_grad_C1 = (self.label_logit_C1 - self.log_C1).clamp_(max=0).exp_() * rest_grad_C1 - ce_scale_C1
        self.write(support_grad_CK - ce_scale_C1 * is_label_CK, rest_grad_C1, label_grad_C1, stash, first_row)

    def write(self, support_grad_CK, rest_grad_C1, label_grad_C1, stash: GradStash, first_row: int) -> None:
        """The same, with the label's share already in support_grad, and in label_grad where it is in the rest."""
        self.kernels.write_rest_grad(
            self.logits_CV, self.ids_CK, self.labels_C, self.support_CK, support_grad_CK, self.label_logit_C1,
            label_grad_C1, self.log_C1, rest_grad_C1, self.head, stash, first_row,
        )  # fmt: skip


def sparse_chunk(
    logits_CV: Tensor, scratch_CV: Tensor | None, part: slice, head: Head, job: Job, stash: GradStash | None,
    first_row: int,
):  # fmt: skip
    """(loss, metric sums, dL/dlogits) of one chunk; both buffers are used up. The kernels put dL/dlogits into the
    stash; None comes back then, and where nothing needs a gradient."""
    labels_C = job.labels_N[part]
    targets = _no_targets(labels_C) if job.targets is None else job.targets.rows(part)
    rest = (KernelRest if job.kernels else TorchRest)(logits_CV, scratch_CV, targets, labels_C, head)
    bucketed = isinstance(targets, BucketedTargets)
    usual = job.targets is None or (job.divergence == "forward_kl" and job.temperature == 1.0)
    if job.kernels and usual and not bucketed:
        return *_usual(rest, targets, part, job, stash, first_row), None
    outcomes_CG = targets.outcomes(rest.support_CK) if bucketed else rest.support_CK
    y_CG1 = torch.cat([outcomes_CG, rest.log_C1], 1)
    logp_CG1 = log_softmax(y_CG1)
    p_CG1 = logp_CG1.exp()
    lse_C1 = torch.logsumexp(y_CG1, 1, keepdim=True)
    ce_C = (lse_C1 - rest.label_logit_C1).squeeze(1)
    value_C, kl_C, grad_CG1 = _divergence(y_CG1, logp_CG1, targets, job)
    home_CG1 = drawn_C1 = None
    if bucketed:  # - log P(label | its bucket), of tokens that the teacher drew
        drawn_C1 = torch.ones_like(lse_C1) if targets.drawn_N is None else targets.drawn_N.to(job.dtype).unsqueeze(1)
        home_CG1 = _home(targets, labels_C, y_CG1) * drawn_C1
    trained_C = value_C
    if bucketed:
        trained_C = value_C + (home_CG1 * y_CG1).sum(1) - (drawn_C1 * rest.label_logit_C1).squeeze(1)
    loss = job.mix(trained_C, ce_C, lse_C1.squeeze(1), part)
    sums_M = _metrics(targets, rest, ce_C, value_C, kl_C, lse_C1, p_CG1, outcomes_CG)
    if not any(job.needs_grad):
        return loss, sums_M, None
    teacher_C1, p_C1, ce_C1 = job.coefficients(lse_C1.squeeze(1), part)
    grad_CG1 = p_CG1.mul_(p_C1) if grad_CG1 is None else grad_CG1.mul_(teacher_C1).add_(p_CG1.mul_(p_C1))
    if bucketed:  # up for the whole bucket, down at the label
        grad_CG1 += home_CG1 * teacher_C1
        ce_C1 = ce_C1 + drawn_C1 * teacher_C1
    grad_CK = grad_CG1[:, :-1]
    if bucketed:
        shares_CK = targets.shares(rest.support_CK, outcomes_CG)
        grad_CK = targets.spread(grad_CK) * shares_CK if grad_CK.shape[1] else shares_CK
    rest_C1 = grad_CG1[:, -1:].masked_fill(rest.log_C1 < LOG_ZERO / 2, 0)  # support is everything: q means nothing
    return loss, sums_M, rest.write_grad(grad_CK, rest_C1, ce_C1, stash, first_row)


def _home(targets: BucketedTargets, labels_C: Tensor, y_CG1: Tensor) -> Tensor:
    """One-hot [C, G1] of the outcome that holds the label, the last one being the rest."""
    at_CK = (targets.ids_NK == labels_C.unsqueeze(1)) & ~targets.padded_NK
    last = y_CG1.shape[1] - 1
    if not at_CK.shape[1]:
        index_C = torch.full_like(labels_C, last)
    else:
        index_C = torch.where(at_CK.any(1), targets.group_NK.masked_fill(~at_CK, -1).amax(1), last)
    return torch.zeros_like(y_CG1).scatter_(1, index_C.unsqueeze(1), 1.0)


def _usual(rest: "KernelRest", targets: SparseTargets, part: slice, job: Job, stash: GradStash | None, first_row: int):
    """(loss, metric sums) of the usual loss, in one kernel between the two operations."""
    from distill.losses.kernels_forward import forward_kl

    columns = (targets.logprobs_NK.float().contiguous(), targets.tail_N.float(), job.scale_N[part], job.alpha_N[part])
    *grads, per_token_CM = forward_kl(rest.ids_CK, rest.labels_C, *columns, job.z_loss, rest.stats)
    if stash is not None:
        rest.write(*grads, stash, first_row)
    sums_M = per_token_CM.sum(0, dtype=torch.float64)
    if job.set_N is not None:
        job.total(per_token_CM[:, -1], part)
    return sums_M[-1], sums_M[:-1]


def _no_targets(labels_C: Tensor) -> SparseTargets:
    count, device = len(labels_C), labels_C.device
    return SparseTargets(labels_C.new_empty(count, 0), torch.empty(count, 0, device=device),
                         torch.ones(count, device=device))  # fmt: skip


def _divergence(y_CK1: Tensor, logp_CK1: Tensor, targets: SparseTargets | BucketedTargets, job: Job):
    """(D, forward KL at temperature 1, dD/dy) of the chunk on the K+1 outcomes; zeros and None without a teacher."""
    if job.targets is None:
        return 0 * y_CK1[:, 0], 0 * y_CK1[:, 0], None
    teacher_CK1 = teacher_logits(targets, job.dtype)
    value_C, grad_CK1 = tempered_value_and_grad(job.divergence, y_CK1, teacher_CK1, job.beta, job.temperature)
    if job.divergence == "forward_kl" and job.temperature == 1.0:
        return value_C, value_C, grad_CK1
    kl_C, _ = value_and_logit_grad("forward_kl", logp_CK1, log_softmax(teacher_CK1))
    return value_C, kl_C, grad_CK1


def _metrics(targets, rest, ce_C, value_C, kl_C, lse_C1, p_CG1, outcomes_CG) -> Tensor:
    members_CK1 = torch.cat([rest.support_CK, rest.mean_C1], 1).clamp_(min=LOG_ZERO)  # no mass: 0 * LOG_ZERO
    mass_CK1 = torch.cat([(rest.support_CK - lse_C1).exp(), p_CG1[:, -1:]], 1)
    best_C1 = torch.cat([rest.support_CK, rest.top_C1], 1).amax(1, keepdim=True)
    entropy_C = (lse_C1 - (members_CK1 * mass_CK1).sum(1, keepdim=True)).squeeze(1).clamp_(min=0)
    if outcomes_CG.shape[1]:
        known_C = (targets.logprobs_NK > -torch.inf).any(1)
        teacher_top_C1 = targets.logprobs_NK.argmax(1, keepdim=True)
        best_outcome_C1 = torch.cat([outcomes_CG, rest.top_C1], 1).amax(1, keepdim=True)
        top1_C = (outcomes_CG.gather(1, teacher_top_C1) >= best_outcome_C1).squeeze(1) & known_C
    else:
        known_C = top1_C = torch.zeros_like(ce_C, dtype=torch.bool)
    return LossMetrics.sums(
        tokens=torch.ones_like(ce_C), ce=ce_C, entropy=entropy_C, label_top1=rest.label_logit_C1 >= best_C1,
        teacher_tokens=known_C, divergence=value_C, kl=kl_C, top1=top1_C, support_mass=p_CG1[:, :-1].sum(1) * known_C,
        student_tail=p_CG1[:, -1] * known_C, teacher_tail=targets.tail_N * known_C,
    )  # fmt: skip
