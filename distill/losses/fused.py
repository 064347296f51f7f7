"""LM head and distillation loss in one: hidden states in, loss and gradients out, logits alive for one token chunk
only.

loss = sum_n scale_n [alpha D_n + (1 - alpha) CE_n + z_loss lse_n^2],  scale_n = w_n / normalizer (reduce.py)

Chunks of text that the teacher only read add alpha times their own loss (chunks.py); the logits of their tokens are
made once more, before all others.

The loss is linear in the gradient that autograd hands back, so dL/dlogits is formed in the forward pass, while the
chunk's logits are there, and the head costs three matrix products instead of six. The backward pass only multiplies by
a scalar.

On a GPU Triton kernels read a chunk's float32 logits and write their gradient to a stash in the operands' dtype, from
which hidden and head gradients are made a block of chunks at a time (stash.py); elsewhere, and for float64, plain torch
does it chunk by chunk. sparse_chunk.py and dense_chunk.py hold the maths.

Shape legend: N tokens, C tokens of a chunk, H student hidden, G teacher hidden, V vocabulary, K support, M metrics.
"""

import importlib.util
import math
import os
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import cache

import torch
from torch import Tensor

from distill.errors import ConfigError, DataError
from distill.losses.buckets import BucketedTargets
from distill.losses.chunks import tangent
from distill.losses.dense_chunk import dense_chunk
from distill.losses.divergence import check_settings
from distill.losses.head import Head, HeadGradients, operand_dtype
from distill.losses.job import DenseTeacher, Job
from distill.losses.metrics import LossMetrics
from distill.losses.reduce import IGNORE_INDEX, token_scale
from distill.losses.sparse import SparseTargets
from distill.losses.sparse_chunk import sparse_chunk
from distill.losses.stash import GradStash

CPU_CHUNK_LOGITS = 2**21  # 8 MiB of float32: the passes over a chunk stay in cache
BLOCK_BYTES = 5 * 2**29  # of dL/dlogits on a GPU: 2.5 GiB, 8,704 tokens of Qwen's vocabulary in bf16
LOGITS_BYTES = 5 * 2**27  # of float32 logits on a GPU: 640 MiB, 1024 tokens of it


def distill_loss(
    hidden_NH: Tensor,
    head_VH: Tensor,
    labels_N: Tensor,
    *,
    targets: SparseTargets | BucketedTargets | DenseTeacher | None = None,
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
    accumulate: torch.dtype | None = None,
    z_loss: float = 0.0,
    set_N: Tensor | None = None,
    set_losses_S: Tensor | None = None,
    add_up_chunks: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> tuple[Tensor, LossMetrics]:
    """(loss, metrics): the scalar loss with a graph to hidden, head and bias, and detached sums over the valid tokens.

    loss = (1 / normalizer) sum_n w_n [alpha D_n + (1 - alpha) CE_n + z_loss logsumexp_n^2], nats.

    hidden_NH, head_VH, bias_V: any floating dtype; whichever needs no gradient costs none. labels_N: int64, the token
    each hidden state predicts (already shifted), -100 where ignored. targets: cached distributions (over buckets of
    tokens where the teacher's tokenizer is another: buckets.py), an online teacher, or None for cross-entropy alone.
    alpha: one number in [0, 1], or [N] to switch per token. normalizer: the GLOBAL number of valid tokens of the
    optimizer step (all micro-batches and ranks). weights_N: per token, default 1. vocab_size: rows of the head past it
    are padding and get neither mass nor gradient. beta, divergence, temperature: divergence.py. chunk_tokens: tokens
    whose logits (on a GPU: their gradients) exist at a time; changes memory and speed, not the result. accumulate:
    dtype in which the head's gradient adds up over chunks, float32 if there are several; the head's own half precision
    saves memory and rounds once a chunk. set_N, set_losses_S: the loss taken apart: what token n adds to it is also
    added, in place, to entry set_N[n] (int64 [N]) of the float64 set_losses_S. add_up_chunks: adds up the chunks' sums
    over the ranks that hold their tokens (chunks.tangent); called once, also without tokens, if targets have chunks.

    Ignored tokens cost nothing, and a batch of them alone gives a zero loss with a graph. The graph may be walked once
    per call; second derivatives do not exist.
    Raises ConfigError for settings out of bounds, DataError for labels, targets or a normalizer that cannot be right.
    """
    check_settings(divergence, beta, temperature)
    job = _make_job(
        hidden_NH, head_VH, bias_V, labels_N, targets, alpha, normalizer, weights_N, vocab_size, chunk_tokens,
        accumulate, divergence=divergence, beta=beta, temperature=temperature, z_loss=z_loss, logit_scale=logit_scale,
        softcap=softcap, set_N=set_N, set_losses_S=set_losses_S, add_up_chunks=add_up_chunks,
    )  # fmt: skip
    loss, sums_M = _HeadLoss.apply(hidden_NH, head_VH, bias_V, job)
    return loss, LossMetrics.from_tensor(sums_M)


def _make_job(
    hidden_NH, head_VH, bias_V, labels_N, targets, alpha, normalizer, weights_N, vocab_size, chunk_tokens, accumulate,
    **settings,
) -> Job:  # fmt: skip
    """Check what was given against each other and settle dtypes, sizes and per-token coefficients."""
    vocab_size = head_VH.shape[0] if vocab_size is None else vocab_size
    _check_shapes(hidden_NH, head_VH, labels_N, targets, vocab_size)
    dtype = torch.float64 if hidden_NH.dtype == head_VH.dtype == torch.float64 else torch.float32
    operands = operand_dtype(hidden_NH, dtype)
    kernels = dtype == torch.float32 and _kernels_serve(hidden_NH.device)
    block_tokens, chunk_tokens = _sizes(vocab_size, chunk_tokens, operands.itemsize, kernels)
    # float16 ends at 6e-8, where 1 / normalizer begins: its gradients are a power of two too large until handed out
    unit = 2.0 ** round(math.log2(normalizer)) if operands == torch.float16 and normalizer > 0 else 1.0
    grad = torch.is_grad_enabled()
    return Job(
        labels_N=labels_N,
        targets=targets,
        scale_N=token_scale(labels_N, weights_N, normalizer, dtype) * unit,
        alpha_N=_alpha_per_token(alpha, labels_N, targets, dtype),
        vocab_size=vocab_size,
        block_tokens=block_tokens,
        chunk_tokens=chunk_tokens,
        dtype=dtype,
        operand_dtype=operands,
        kernels=kernels,
        accumulate=accumulate or (operands if len(labels_N) <= block_tokens else dtype),
        unit=unit,
        needs_grad=tuple(grad and x is not None and x.requires_grad for x in (hidden_NH, head_VH, bias_V)),
        **settings,
    )


@cache
def has_triton() -> bool:
    """Whether the kernels can be had; said once where a GPU has to do without."""
    found = importlib.util.find_spec("triton") is not None
    if not found and torch.cuda.is_available():
        warnings.warn("Triton is not installed: the loss runs in plain torch, slower and in more memory", stacklevel=2)
    return found


def _kernels_serve(device: torch.device) -> bool:
    if device.type == "cuda":
        return has_triton()
    return os.environ.get("TRITON_INTERPRET") == "1" and has_triton()


def _sizes(vocab_size: int, chunk_tokens: int | None, itemsize: int, kernels: bool) -> tuple[int, int]:
    """(tokens of a block, tokens of a chunk): whole tiles of a matrix product on a GPU, one and the same elsewhere."""
    if not kernels:
        tokens = chunk_tokens or min(max(CPU_CHUNK_LOGITS // vocab_size, 128), 4096)
        return tokens, tokens
    block = chunk_tokens or max(BLOCK_BYTES // (vocab_size * itemsize) // 256 * 256, 256)
    return block, min(block, max(LOGITS_BYTES // (vocab_size * 4) // 128 * 128, 128))


def _alpha_per_token(alpha: float | Tensor, labels_N: Tensor, targets, dtype: torch.dtype) -> Tensor:
    if isinstance(alpha, Tensor):
        alpha_N = alpha.to(labels_N.device, dtype, non_blocking=True).expand(labels_N.shape)
        if labels_N.numel() == 0:
            return alpha_N
        low, high = alpha.min().item(), alpha.max().item()  # where it lies: on the CPU this waits for nothing
    else:  # a number is looked at here: on a GPU asking a tensor would wait for everything before it
        alpha_N = torch.full(labels_N.shape, float(alpha), dtype=dtype, device=labels_N.device)
        low = high = float(alpha)
    if not 0 <= low <= high <= 1:
        raise ConfigError("must be between 0 and 1", where="loss.alpha", value=(low, high))
    if targets is None and high > 0:
        remedy = "Give targets, or alpha=0 for cross-entropy on the sampled tokens."
        raise DataError("alpha asks for a teacher but targets is None", where="distill_loss", value=high, remedy=remedy)
    return alpha_N


def _check_shapes(hidden_NH, head_VH, labels_N, targets, vocab_size: int) -> None:
    tokens = {"hidden": hidden_NH.shape[0], "labels": labels_N.shape[0]}
    if isinstance(targets, SparseTargets | BucketedTargets):
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
        if isinstance(targets, SparseTargets | BucketedTargets):
            targets.check(vocab_size, distinct=False)


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_NH, head_VH, bias_V, job: Job):
        with torch.autocast(hidden_NH.device.type, enabled=False):
            loss, sums_M, ctx.grads = _run((hidden_NH, head_VH, bias_V), job)
        ctx.unit = job.unit
        ctx.mark_non_differentiable(sums_M)
        return loss, sums_M

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, upstream, _):
        # Handed over, not kept: autograd then takes these very tensors as .grad instead of copying a whole head.
        grads, ctx.grads = ctx.grads, None
        if grads is None:
            raise RuntimeError("distill_loss: the gradients of this loss were already handed out; call it once more")
        for grad in grads:
            if grad is not None:
                _scale_(grad, upstream / ctx.unit)
        return *grads, None


def _scale_(grad: Tensor, upstream: Tensor) -> None:
    if upstream.device.type == "cpu":
        if upstream != 1:
            grad.mul_(upstream)
    elif has_triton():
        from distill.losses.kernels import scale_

        scale_(grad, upstream)  # looks at the factor on the device: the usual 1 costs nothing
    else:
        grad.mul_(upstream)


def _run(inputs: tuple[Tensor, Tensor, Tensor | None], whole: Job):
    """(loss, metric sums, gradients of hidden, head and bias or None), one block of valid tokens after the other."""
    hidden_NH, head_VH, bias_V = inputs
    job, rows = whole.valid()
    hidden_NH = (hidden_NH.detach() if rows is None else hidden_NH.detach()[rows]).to(job.operand_dtype)
    weight_VH = head_VH.detach()[: job.vocab_size].to(job.operand_dtype)
    bias = None if bias_V is None else bias_V.detach()[: job.vocab_size].to(job.dtype)
    head = Head(weight_VH, bias, job.logit_scale, job.softcap)
    job = _with_chunks(job, hidden_NH, head)
    gradients = HeadGradients(inputs, rows, job)
    loss = torch.zeros((), dtype=torch.float64, device=hidden_NH.device)
    sums_M = LossMetrics.zeros(hidden_NH.device).as_tensor()
    tokens = len(hidden_NH)
    buffers = _Buffers(tokens, hidden_NH, job)
    for begin in range(0, tokens, job.block_tokens):
        end = min(begin + job.block_tokens, tokens)
        for start in range(begin, end, job.chunk_tokens):
            part = slice(start, min(start + job.chunk_tokens, end))
            chunk_loss, chunk_sums_M, grad_CV = buffers.chunk(hidden_NH[part], part, head, start - begin)
            loss += chunk_loss
            sums_M += chunk_sums_M
            if grad_CV is not None:
                gradients.add([(0, grad_CV.to(job.operand_dtype))], hidden_NH[part], part, weight_VH)
        if buffers.stash is not None:
            part = slice(begin, end)
            gradients.take(buffers.stash, hidden_NH[part], part, weight_VH, only=tokens <= job.block_tokens)
    buffers = None  # before the gradients are converted
    return (loss / job.unit).to(job.dtype), sums_M, gradients.finished()


def _with_chunks(job: Job, hidden_NH: Tensor, head: Head) -> Job:
    """The job with the loss of its targets' chunks, if they have any."""
    chunk_N = getattr(job.targets, "chunk_N", None)
    if chunk_N is None:
        return job
    logp_N = torch.zeros(chunk_N.shape, dtype=job.dtype, device=chunk_N.device)
    for rows in (chunk_N >= 0).nonzero().squeeze(1).split(job.chunk_tokens):
        logits_CV = head.logits(hidden_NH[rows])
        logp_N[rows] = logits_CV.gather(1, job.labels_N[rows, None]).squeeze(1) - torch.logsumexp(logits_CV, 1)
    slope_N, offset_N = tangent(logp_N, chunk_N, job.targets.chunk_logprobs_N, job.add_up_chunks)
    return replace(job, slope_N=slope_N, offset_N=offset_N)


class _Buffers:
    """Room for a chunk's logits, for the teacher's or as scratch, and for a block's dL/dlogits where kernels write."""

    def __init__(self, tokens: int, hidden_NH: Tensor, job: Job):
        self.job, self.dense, device = job, isinstance(job.targets, DenseTeacher), hidden_NH.device
        rows, self.stash = max(min(tokens, job.chunk_tokens), 1), None
        # Rows that start on 16 bytes suit the matrix units; a vocabulary need not be a multiple of 4.
        width = -(-job.vocab_size // 4) * 4 if job.kernels else job.vocab_size
        count = 2 if self.dense or not job.kernels else 1
        if job.kernels and any(job.needs_grad) and tokens:
            room = rows * width * job.dtype.itemsize
            block = min(tokens, job.block_tokens)
            size = (block, job.vocab_size, job.operand_dtype, device)
            self.stash = GradStash.empty(*size, logits_bytes=room, hidden=hidden_NH.shape[1])
        logits = [torch.empty(rows, width, dtype=job.dtype, device=device) for _ in range(count - bool(self.stash))]
        if self.stash is not None:
            logits.insert(0, self.stash.logits_room(rows, width, job.dtype))
        self.logits = [buffer[:, : job.vocab_size] for buffer in logits]

    def chunk(self, hidden_CH: Tensor, part: slice, head: Head, first_row: int):
        """(loss, metric sums, dL/dlogits where it does not go to the stash)."""
        logits_CV, *other = (buffer[: len(hidden_CH)] for buffer in self.logits)
        (head.product if self.job.kernels else head.logits)(hidden_CH, logits_CV)
        chunk = dense_chunk if self.dense else sparse_chunk
        return chunk(logits_CV, other[0] if other else None, part, head, self.job, self.stash, first_row)
