"""LM head and distillation loss in one: hidden states in, loss and gradients out, logits alive for one token chunk
only.

loss = sum_n scale_n [alpha D_n + (1 - alpha) CE_n + z_loss lse_n^2],  scale_n = w_n / normalizer (reduce.py)

The loss is linear in the gradient that autograd hands back, so dL/dlogits is formed in the forward pass, while the
chunk's logits are there, and the head costs three matrix products instead of six. The backward pass only multiplies by
a scalar.

On the K+1 outcomes of a sparse target (sparse.py) all the maths of divergence, cross-entropy and z-loss happens in
[C, K+1]; the vocabulary sees a max, a softmax in place and one scaling per row. Cross-entropy alone is K = 0.

Shape legend: N tokens, C tokens of a chunk, H student hidden, G teacher hidden, V vocabulary, K support, M metrics.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from distill.errors import ConfigError, DataError
from distill.losses.divergence import (
    LOG_ZERO,
    check_settings,
    log_softmax,
    tempered_value_and_grad,
    value_and_logit_grad,
)
from distill.losses.head import Head, matmul, operand_dtype
from distill.losses.metrics import LossMetrics
from distill.losses.reduce import IGNORE_INDEX, token_scale
from distill.losses.sparse import SparseTargets, mask_support_, teacher_logits

CPU_CHUNK_LOGITS = 2**21  # 8 MiB of float32: the passes over a chunk stay in cache
DEVICE_CHUNK_LOGITS = 2**28


@dataclass(frozen=True)
class DenseTeacher:
    """An online teacher over the student's vocabulary: its hidden states [N, G] and head [V, G]; it gets no
    gradient."""

    hidden_NG: Tensor
    head_VG: Tensor
    bias_V: Tensor | None = None
    logit_scale: float = 1.0
    softcap: float | None = None


@dataclass(frozen=True)
class _Job:
    """Everything of one call besides the three tensors that may need a gradient."""

    labels_N: Tensor
    targets: SparseTargets | DenseTeacher | None
    scale_N: Tensor
    alpha_N: Tensor
    divergence: str
    beta: float
    temperature: float
    z_loss: float
    logit_scale: float
    softcap: float | None
    vocab_size: int
    chunk_tokens: int
    dtype: torch.dtype  # of logits, per-token losses and accumulators
    operand_dtype: torch.dtype  # of what enters a matrix product
    needs_grad: tuple[bool, bool, bool] = field(default=(False, False, False))  # hidden, head, bias


def distill_loss(
    hidden_NH: Tensor,
    head_VH: Tensor,
    labels_N: Tensor,
    *,
    targets: SparseTargets | DenseTeacher | None = None,
    alpha: float | Tensor = 0.0,
    normalizer: float,
    divergence: str = "forward_kl",
    beta: float = 0.5,
    temperature: float = 1.0,
    weights_N: Tensor | None = None,
    bias_V: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    vocab_size: int | None = None,
    chunk_tokens: int | None = None,
    z_loss: float = 0.0,
) -> tuple[Tensor, LossMetrics]:
    """(loss, metrics): the scalar loss with a graph to hidden, head and bias, and detached sums over the valid tokens.

    loss = (1 / normalizer) sum_n w_n [alpha D_n + (1 - alpha) CE_n + z_loss logsumexp_n^2], nats.

    hidden_NH, head_VH, bias_V: any floating dtype; whichever needs no gradient costs none. labels_N: int64, the token
    each hidden state predicts (already shifted), -100 where ignored. targets: cached distributions, an online teacher,
    or None for cross-entropy alone. alpha: one number in [0, 1], or [N] to switch per token. normalizer: the GLOBAL
    number of valid tokens of the optimizer step (all micro-batches and ranks). weights_N: per token, default 1.
    vocab_size: rows of the head past it are padding and get neither mass nor gradient. beta, divergence, temperature:
    divergence.py. chunk_tokens: tokens whose logits exist at a time; changes memory and speed, not the result.

    Ignored tokens cost nothing, and a batch of them alone gives a zero loss with a graph. The graph may be walked once
    per call, or again with retain_graph; second derivatives do not exist.
    Raises ConfigError for settings out of bounds, DataError for labels, targets or a normalizer that cannot be right.
    """
    check_settings(divergence, beta, temperature)
    job = _make_job(
        hidden_NH, head_VH, bias_V, labels_N, targets, alpha, normalizer, weights_N, vocab_size, chunk_tokens,
        divergence=divergence, beta=beta, temperature=temperature, z_loss=z_loss, logit_scale=logit_scale,
        softcap=softcap,
    )  # fmt: skip
    loss, sums_M = _HeadLoss.apply(hidden_NH, head_VH, bias_V, job)
    return loss, LossMetrics.from_tensor(sums_M)


def _make_job(
    hidden_NH, head_VH, bias_V, labels_N, targets, alpha, normalizer, weights_N, vocab_size, chunk_tokens, **settings
) -> _Job:
    """Check what was given against each other and settle dtypes, sizes and per-token coefficients."""
    vocab_size = head_VH.shape[0] if vocab_size is None else vocab_size
    _check_shapes(hidden_NH, head_VH, labels_N, targets, vocab_size)
    dtype = torch.float64 if hidden_NH.dtype == head_VH.dtype == torch.float64 else torch.float32
    budget = CPU_CHUNK_LOGITS if hidden_NH.device.type == "cpu" else DEVICE_CHUNK_LOGITS
    grad = torch.is_grad_enabled()
    return _Job(
        labels_N=labels_N,
        targets=targets,
        scale_N=token_scale(labels_N, weights_N, normalizer, dtype),
        alpha_N=_alpha_per_token(alpha, labels_N, targets, dtype),
        vocab_size=vocab_size,
        chunk_tokens=chunk_tokens or min(max(budget // vocab_size, 128), 4096),
        dtype=dtype,
        operand_dtype=operand_dtype(hidden_NH, dtype),
        needs_grad=tuple(grad and x is not None and x.requires_grad for x in (hidden_NH, head_VH, bias_V)),
        **settings,
    )


def _alpha_per_token(alpha: float | Tensor, labels_N: Tensor, targets, dtype: torch.dtype) -> Tensor:
    alpha_N = torch.as_tensor(alpha, dtype=dtype, device=labels_N.device).expand(labels_N.shape)
    if labels_N.numel() == 0:
        return alpha_N
    low, high = alpha_N.min().item(), alpha_N.max().item()
    if not 0 <= low <= high <= 1:
        raise ConfigError("must be between 0 and 1", where="loss.alpha", value=(low, high))
    if targets is None and high > 0:
        remedy = "Give targets, or alpha=0 for cross-entropy on the sampled tokens."
        raise DataError("alpha asks for a teacher but targets is None", where="distill_loss", value=high, remedy=remedy)
    return alpha_N


def _check_shapes(hidden_NH, head_VH, labels_N, targets, vocab_size: int) -> None:
    tokens = {"hidden": hidden_NH.shape[0], "labels": labels_N.shape[0]}
    if isinstance(targets, SparseTargets):
        tokens["targets"] = targets.ids_NK.shape[0]
    elif isinstance(targets, DenseTeacher):
        tokens["targets"] = targets.hidden_NG.shape[0]
        if targets.head_VG.shape[0] < vocab_size:
            found = (targets.head_VG.shape[0], vocab_size)
            raise DataError("the teacher's head has fewer rows than vocab_size", where="distill_loss", value=found,
                            remedy="A dense teacher must share the student's vocabulary.")  # fmt: skip
    if len(set(tokens.values())) > 1:
        raise DataError(
            "token counts differ", where="distill_loss", value=tokens, remedy="Flatten all to the same N tokens."
        )
    if not 0 < vocab_size <= head_VH.shape[0]:
        raise ConfigError(
            "must be between 1 and the rows of the head", where="vocab_size", value=(vocab_size, head_VH.shape[0])
        )
    if labels_N.device.type == "cpu":  # on a GPU the check would stall the stream; an index out of range stops it there
        bad_N = (labels_N != IGNORE_INDEX) & ((labels_N < 0) | (labels_N >= vocab_size))
        if bool(bad_N.any()):
            found = int(labels_N[bad_N][0])
            raise DataError(
                f"a label is outside the {vocab_size} tokens of the vocabulary",
                where="distill_loss",
                value=found,
                remedy="Ignored tokens are -100; other labels come from this student's tokenizer.",
            )
        if isinstance(targets, SparseTargets):
            targets.check(vocab_size, distinct=False)


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_NH, head_VH, bias_V, job: _Job):
        with torch.autocast(hidden_NH.device.type, enabled=False):
            loss, sums_M, grads = _run(hidden_NH, head_VH, bias_V, job)
        ctx.save_for_backward(*grads)
        ctx.mark_non_differentiable(sums_M)
        return loss, sums_M

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, upstream, _):
        return *(None if grad is None else grad * upstream.to(grad.dtype) for grad in ctx.saved_tensors), None


def _run(hidden_NH, head_VH, bias_V, job: _Job):
    """(loss, metric sums, gradients of hidden, head and bias or None), one chunk of valid tokens after the other."""
    rows_N = (job.labels_N != IGNORE_INDEX).nonzero().squeeze(1)
    weight_VH = head_VH.detach()[: job.vocab_size].to(job.operand_dtype)
    bias = None if bias_V is None else bias_V.detach()[: job.vocab_size].to(job.dtype)
    head = Head(weight_VH, bias, job.logit_scale, job.softcap)
    grads = [
        torch.zeros_like(x, dtype=job.dtype) if need else None
        for x, need in zip((hidden_NH, head_VH, bias_V), job.needs_grad)
    ]
    size = (min(job.chunk_tokens, max(len(rows_N), 1)), job.vocab_size)
    scratch = [torch.empty(size, dtype=job.dtype, device=hidden_NH.device) for _ in range(2)]
    loss = torch.zeros((), dtype=torch.float64, device=hidden_NH.device)
    sums_M = LossMetrics.zeros(hidden_NH.device).as_tensor()
    for rows_C in rows_N.split(job.chunk_tokens):
        hidden_CH = hidden_NH.detach().index_select(0, rows_C).to(job.operand_dtype)
        buffers = [buffer[: len(rows_C)] for buffer in scratch]
        head.logits(hidden_CH, buffers[0])
        slope_CV = None
        if job.softcap is not None and any(job.needs_grad):
            slope_CV = 1 - (buffers[0] / job.softcap).square_()
        chunk_loss, chunk_sums_M, grad_CV = _chunk_of(job)(buffers, rows_C, job)
        loss += chunk_loss
        sums_M += chunk_sums_M
        if grad_CV is not None:
            _accumulate(grads, grad_CV, slope_CV, hidden_CH, rows_C, weight_VH, job)
    like = (hidden_NH, head_VH, bias_V)
    return loss.to(job.dtype), sums_M, [g if g is None else g.to(x.dtype) for g, x in zip(grads, like)]


def _chunk_of(job: _Job):
    return _dense_chunk if isinstance(job.targets, DenseTeacher) else _sparse_chunk


def _accumulate(grads, grad_CV, slope_CV, hidden_CH, rows_C, weight_VH, job: _Job) -> None:
    """Add a chunk's dL/dlogits to the gradients of hidden states, head and bias."""
    if slope_CV is not None:
        grad_CV.mul_(slope_CV)
    if job.logit_scale != 1.0:
        grad_CV.mul_(job.logit_scale)
    operand_CV = grad_CV.to(job.operand_dtype)
    hidden_grad_NH, head_grad_VH, bias_grad_V = grads
    if hidden_grad_NH is not None:
        hidden_grad_NH.index_copy_(0, rows_C, matmul(operand_CV, weight_VH))
    if head_grad_VH is not None:
        rows_VH = head_grad_VH[: job.vocab_size]
        if job.operand_dtype == job.dtype:
            rows_VH.addmm_(operand_CV.T, hidden_CH)
        else:
            rows_VH.add_(matmul(operand_CV.T, hidden_CH))
    if bias_grad_V is not None:
        bias_grad_V[: job.vocab_size].add_(grad_CV.sum(0))


def _sparse_chunk(buffers, rows_C: Tensor, job: _Job):
    """(loss, metric sums, dL/dlogits) of one chunk against K+1 outcomes; buffers: the logits and as much scratch."""
    logits_CV, rest_CV = buffers
    targets = _no_targets(rows_C) if job.targets is None else job.targets.rows(rows_C)
    labels_C1 = job.labels_N[rows_C].unsqueeze(1)
    label_logit_C1 = logits_CV.gather(1, labels_C1)
    support_CK, ids_CK = mask_support_(logits_CV, targets)
    top_rest_C1 = logits_CV.amax(1, keepdim=True)
    torch.softmax(logits_CV, 1, out=rest_CV)  # q, the distribution within the rest
    log_rest_C1 = top_rest_C1 - rest_CV.amax(1, keepdim=True).log()  # the largest q is 1 / sum exp(z - max)
    mean_rest_C1 = logits_CV.mul_(rest_CV).sum(1, keepdim=True)
    y_CK1 = torch.cat([support_CK, log_rest_C1], 1)
    logp_CK1 = log_softmax(y_CK1)
    p_CK1 = logp_CK1.exp()
    lse_C1 = torch.logsumexp(y_CK1, 1, keepdim=True)
    ce_C = (lse_C1 - label_logit_C1).squeeze(1)
    scale_C, alpha_C = job.scale_N[rows_C], job.alpha_N[rows_C]
    value_C, kl_C, grad_CK1 = _sparse_divergence(y_CK1, logp_CK1, targets, job)
    loss = _mix(value_C, ce_C, lse_C1.squeeze(1), alpha_C, scale_C, job)

    means_CK1 = torch.cat([support_CK, mean_rest_C1], 1).clamp_(min=LOG_ZERO)  # a rest of no mass is 0 * LOG_ZERO
    top_CK1 = torch.cat([support_CK, top_rest_C1], 1)
    sums_M = _sparse_metrics(targets, ce_C, value_C, kl_C, lse_C1, label_logit_C1, means_CK1, top_CK1, p_CK1)
    if not any(job.needs_grad):
        return loss, sums_M, None

    ce_scale_C1 = (scale_C * (1 - alpha_C)).unsqueeze(1)
    p_scale_C1 = ce_scale_C1 + 2 * job.z_loss * lse_C1 * scale_C.unsqueeze(1)
    grad_CK1 = (
        p_CK1.mul_(p_scale_C1)
        if grad_CK1 is None
        else grad_CK1.mul_((scale_C * alpha_C).unsqueeze(1)).add_(p_CK1.mul_(p_scale_C1))
    )
    rest_C1 = grad_CK1[:, -1:].masked_fill(log_rest_C1 < LOG_ZERO / 2, 0)  # support is everything: q means nothing
    grad_CV = rest_CV.mul_(rest_C1)
    if ids_CK.shape[1]:
        grad_CV.scatter_add_(1, ids_CK, grad_CK1[:, :-1].masked_fill(targets.logprobs_NK == -torch.inf, 0))
    grad_CV.scatter_add_(1, labels_C1, -ce_scale_C1)
    return loss, sums_M, grad_CV


def _no_targets(rows_C: Tensor) -> SparseTargets:
    return SparseTargets(rows_C.new_empty(len(rows_C), 0), rows_C.new_empty(len(rows_C), 0, dtype=torch.float32),
                         torch.ones(len(rows_C), device=rows_C.device))  # fmt: skip


def _sparse_divergence(y_CK1, logp_CK1, targets: SparseTargets, job: _Job):
    """(D, forward KL at temperature 1, dD/dy) of the chunk on the K+1 outcomes; zeros and None without a teacher."""
    if job.targets is None:
        return 0 * y_CK1[:, 0], 0 * y_CK1[:, 0], None
    teacher_CK1 = teacher_logits(targets, job.dtype)
    value_C, grad_CK1 = tempered_value_and_grad(job.divergence, y_CK1, teacher_CK1, job.beta, job.temperature)
    if job.divergence == "forward_kl" and job.temperature == 1.0:
        return value_C, value_C, grad_CK1
    kl_C, _ = value_and_logit_grad("forward_kl", logp_CK1, log_softmax(teacher_CK1))
    return value_C, kl_C, grad_CK1


def _mix(value_C, ce_C, lse_C, alpha_C, scale_C, job: _Job) -> Tensor:
    loss_C = alpha_C * value_C + (1 - alpha_C) * ce_C
    if job.z_loss:
        loss_C += job.z_loss * lse_C.square()
    return (scale_C * loss_C).sum()


def _sparse_metrics(targets, ce_C, value_C, kl_C, lse_C1, label_logit_C1, means_CK1, top_CK1, p_CK1) -> Tensor:
    best_C1 = top_CK1.amax(1, keepdim=True)
    entropy_C = (lse_C1 - (means_CK1 * p_CK1).sum(1, keepdim=True)).squeeze(1).clamp_(min=0)
    if targets.ids_NK.shape[1]:
        known_C = (targets.logprobs_NK > -torch.inf).any(1)
        teacher_top_C1 = targets.logprobs_NK.argmax(1, keepdim=True)
        top1_C = (top_CK1.gather(1, teacher_top_C1) >= best_C1).squeeze(1) & known_C
    else:
        known_C = top1_C = torch.zeros_like(ce_C, dtype=torch.bool)
    student_tail_C = p_CK1[:, -1] * known_C
    return LossMetrics.sums(
        tokens=torch.ones_like(ce_C), ce=ce_C, entropy=entropy_C, label_top1=label_logit_C1 >= best_C1,
        teacher_tokens=known_C, divergence=value_C, kl=kl_C, top1=top1_C, support_mass=p_CK1[:, :-1].sum(1) * known_C,
        student_tail=student_tail_C, teacher_tail=targets.tail_N * known_C,
    )  # fmt: skip


def _dense_chunk(buffers, rows_C: Tensor, job: _Job):
    """(loss, metric sums, dL/dlogits) of one chunk against an online teacher over the same vocabulary."""
    logits_CV, teacher_CV = buffers
    _teacher_head(job).logits(job.targets.hidden_NG.detach().index_select(0, rows_C).to(job.operand_dtype), teacher_CV)
    labels_C1 = job.labels_N[rows_C].unsqueeze(1)
    logp_CV = log_softmax(logits_CV)
    p_CV = logp_CV.exp()
    lse_C = torch.logsumexp(logits_CV, 1)
    ce_C = -logp_CV.gather(1, labels_C1).squeeze(1)
    value_C, grad_CV = tempered_value_and_grad(job.divergence, logits_CV, teacher_CV, job.beta, job.temperature)
    kl_C = value_C
    if job.divergence != "forward_kl" or job.temperature != 1.0:
        kl_C, _ = value_and_logit_grad("forward_kl", logp_CV, log_softmax(teacher_CV))
    scale_C, alpha_C = job.scale_N[rows_C], job.alpha_N[rows_C]
    loss = _mix(value_C, ce_C, lse_C, alpha_C, scale_C, job)
    best_C1 = logits_CV.amax(1, keepdim=True)
    ones_C, zeros_C = torch.ones_like(ce_C), torch.zeros_like(ce_C)
    sums_M = LossMetrics.sums(
        tokens=ones_C, ce=ce_C, entropy=-logp_CV.mul_(p_CV).sum(1),
        label_top1=logits_CV.gather(1, labels_C1) >= best_C1, teacher_tokens=ones_C,
        divergence=value_C, kl=kl_C, support_mass=ones_C, student_tail=zeros_C, teacher_tail=zeros_C,
        top1=logits_CV.gather(1, teacher_CV.argmax(1, keepdim=True)) >= best_C1,
    )  # fmt: skip
    if not any(job.needs_grad):
        return loss, sums_M, None
    ce_scale_C1 = (scale_C * (1 - alpha_C)).unsqueeze(1)
    p_scale_C1 = ce_scale_C1 + (2 * job.z_loss * lse_C * scale_C).unsqueeze(1)
    grad_CV.mul_((scale_C * alpha_C).unsqueeze(1)).add_(p_CV.mul_(p_scale_C1))
    return loss, sums_M, grad_CV.scatter_add_(1, labels_C1, -ce_scale_C1)


def _teacher_head(job: _Job) -> Head:
    teacher = job.targets
    weight_VG = teacher.head_VG.detach()[: job.vocab_size].to(job.operand_dtype)
    bias_V = None if teacher.bias_V is None else teacher.bias_V.detach()[: job.vocab_size].to(job.dtype)
    return Head(weight_VG, bias_V, teacher.logit_scale, teacher.softcap)
