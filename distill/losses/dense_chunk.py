"""A chunk of tokens against an online teacher over the same vocabulary: loss, metrics and dL/dlogits.

Shape legend: C tokens of a chunk, V vocabulary.
"""

import torch
from torch import Tensor

from distill.losses.divergence import log_softmax, tempered_value_and_grad, value_and_logit_grad
from distill.losses.head import Head
from distill.losses.job import Job
from distill.losses.metrics import LossMetrics
from distill.losses.stash import GradStash


def teacher_head(job: Job) -> Head:
    """The teacher's head over the student's real tokens."""
    teacher = job.targets
    weight_VG = teacher.head_VG.detach()[: job.vocab_size].to(job.operand_dtype)
    bias_V = None if teacher.bias_V is None else teacher.bias_V.detach()[: job.vocab_size].to(job.dtype)
    return Head(weight_VG, bias_V, teacher.logit_scale, teacher.softcap)


def dense_chunk(
    logits_CV: Tensor, teacher_CV: Tensor, part: slice, head: Head, job: Job, stash: GradStash | None, first_row: int
):
    """(loss, metric sums, dL/dlogits) of one chunk; teacher_CV is room for the teacher's logits. The kernels put
    dL/dlogits into the stash; None comes back then, and where nothing needs a gradient."""
    teacher = teacher_head(job)
    hidden_CG = job.targets.hidden_NG.detach()[part].to(job.operand_dtype)
    if job.kernels:
        teacher.product(hidden_CG, teacher_CV)
        return _by_kernels(logits_CV, teacher_CV, part, head, teacher, job, stash, first_row)
    teacher.logits(hidden_CG, teacher_CV)
    return _in_torch(logits_CV, teacher_CV, part, head, job)


def _by_kernels(logits_CV, teacher_CV, part: slice, head: Head, teacher: Head, job: Job, stash, first_row: int):
    from distill.losses.kernels_dense import DensePair

    rule, factor = _rule(job.divergence, job.beta)
    labels_C = job.labels_N[part]
    pair = DensePair(logits_CV, teacher_CV, labels_C, head, teacher, rule, job.beta, job.temperature)
    lse_C, label_C, best_C, at_teacher_C = (pair.stats_CX[:, i] for i in (0, 4, 5, 6))
    if any(job.needs_grad):
        teacher_C1, p_C1, ce_C1 = job.coefficients(lse_C, part)
        # sum w is -1 for forward KL, whatever the tokens; the others need a pass that only sums
        weight_sum_C = -torch.ones_like(lse_C) if rule == "forward_kl" else pair.sums()[:, 3]
        sums_C4 = pair.write_grad(weight_sum_C, torch.cat([teacher_C1 * factor, p_C1, ce_C1], 1), stash, first_row)
    else:
        sums_C4 = pair.sums()
    value_C, kl_C = sums_C4[:, 0] * factor, sums_C4[:, 1]
    ce_C = lse_C - label_C
    loss = job.mix(value_C, ce_C, lse_C, part)
    entropy_C = (lse_C - sums_C4[:, 2]).clamp(min=0)
    sums_M = _sums(ce_C, entropy_C, value_C, kl_C, label_C >= best_C, at_teacher_C >= best_C)
    return loss, sums_M, None


def _rule(divergence: str, beta: float) -> tuple[str, float]:
    """The kernel's rule and a factor on its value: scaled_jsd is jsd times a constant, or one of its limits."""
    if divergence != "scaled_jsd":
        return divergence, 1.0
    if beta in (0.0, 1.0):
        return ("forward_kl", "reverse_kl")[int(beta)], 1.0
    return "jsd", 1 / (beta * (1 - beta))


def _in_torch(logits_CV: Tensor, teacher_CV: Tensor, part: slice, head: Head, job: Job):
    slope_CV = None if head.softcap is None else 1 - (logits_CV / head.softcap).square_()
    labels_C1 = job.labels_N[part].unsqueeze(1)
    logp_CV = log_softmax(logits_CV)
    p_CV = logp_CV.exp()
    lse_C = torch.logsumexp(logits_CV, 1)
    ce_C = -logp_CV.gather(1, labels_C1).squeeze(1)
    value_C, grad_CV = tempered_value_and_grad(job.divergence, logits_CV, teacher_CV, job.beta, job.temperature)
    kl_C = value_C
    if job.divergence != "forward_kl" or job.temperature != 1.0:
        kl_C, _ = value_and_logit_grad("forward_kl", logp_CV, log_softmax(teacher_CV))
    loss = job.mix(value_C, ce_C, lse_C, part)
    best_C1 = logits_CV.amax(1, keepdim=True)
    at_teacher_C1 = logits_CV.gather(1, teacher_CV.argmax(1, keepdim=True))
    entropy_C = -logp_CV.mul_(p_CV).sum(1)
    label_C1 = logits_CV.gather(1, labels_C1)
    sums_M = _sums(ce_C, entropy_C, value_C, kl_C, label_C1 >= best_C1, at_teacher_C1 >= best_C1)
    if not any(job.needs_grad):
        return loss, sums_M, None
    teacher_C1, p_C1, ce_C1 = job.coefficients(lse_C, part)
    grad_CV.mul_(teacher_C1).add_(p_CV.mul_(p_C1)).scatter_add_(1, labels_C1, -ce_C1)
    if slope_CV is not None:
        grad_CV.mul_(slope_CV)
    return loss, sums_M, grad_CV if head.logit_scale == 1.0 else grad_CV.mul_(head.logit_scale)


def _sums(ce_C, entropy_C, value_C, kl_C, label_top1, top1) -> Tensor:
    ones_C, zeros_C = torch.ones_like(ce_C), torch.zeros_like(ce_C)
    return LossMetrics.sums(
        tokens=ones_C, ce=ce_C, entropy=entropy_C, label_top1=label_top1, teacher_tokens=ones_C, divergence=value_C,
        kl=kl_C, support_mass=ones_C, student_tail=zeros_C, teacher_tail=zeros_C, top1=top1,
    )  # fmt: skip
