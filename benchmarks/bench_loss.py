"""What do LM head and distillation loss cost in a student's step, against the matrix products they cannot avoid?

    python -m benchmarks.bench_loss

Forward and backward of head + loss in bfloat16 on one GPU, each as a multiple of the bare products in the same run
(three for a cached teacher: logits, hidden gradient, head gradient; a fourth for the logits of an online teacher), with
the peak memory above the inputs, head gradient included, and the gradients' error against float64. Beside it, where
installed and where they fit: plain torch, Liger's fused losses, TRL's chunked divergence. A shape is tokens x student
hidden x vocabulary; an online teacher is 7168 wide, as DeepSeek-R1 is.
"""

import argparse
import statistics
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.results_file import row, write
from distill.commit import commit
from distill.losses.fused import distill_loss
from distill.losses.job import DenseTeacher
from distill.losses.sparse import SparseTargets

SHAPES = [(8192, 5120, 151_936), (4096, 2048, 151_936), (16_384, 8192, 128_256), (32_768, 5120, 151_936)]
TEACHER_HIDDEN = 7168
SUPPORT = 64
GIB = 2**30
GOALS = {"sparse_kl_tail_ce": "<= 1.10", "dense_kl_online": "<= 1.12"}
CURVE = [(512, True), (1024, True), (2048, True), (4096, True), (4096, False), (8192, False)]  # tokens, compact


class Problem:
    """Random states and heads of one shape, a cached and an online teacher, and labels; on the GPU, in bfloat16."""

    def __init__(self, tokens: int, hidden: int, vocab: int, seed: int = 0):
        draw = torch.Generator("cuda").manual_seed(seed)
        normal = lambda *shape: torch.randn(*shape, generator=draw, device="cuda", dtype=torch.bfloat16)  # noqa: E731
        self.tokens, self.vocab = tokens, vocab
        self.hidden = normal(tokens, hidden).requires_grad_()
        self.head = (normal(vocab, hidden) * (3 / hidden**0.5)).requires_grad_()
        self.teacher_hidden = normal(tokens, TEACHER_HIDDEN)
        self.teacher_head = normal(vocab, TEACHER_HIDDEN) * (3 / TEACHER_HIDDEN**0.5)
        self.labels = torch.randint(vocab, (tokens,), generator=draw, device="cuda")
        self.cached = self._cache()

    def _cache(self) -> SparseTargets:
        parts = []
        for rows in torch.arange(self.tokens, device="cuda").split(1024):
            logp = torch.log_softmax((self.teacher_hidden[rows] @ self.teacher_head.T).float(), 1)
            top, ids = logp.topk(SUPPORT)
            parts.append((ids, top, 1 - top.exp().sum(1)))
        return SparseTargets(*(torch.cat(column) for column in zip(*parts)))

    def sparse(self, **options) -> Tensor:
        return distill_loss(self.hidden, self.head, self.labels, targets=self.cached, alpha=0.9,
                            normalizer=self.tokens, **options)[0]  # fmt: skip

    def dense(self, divergence: str = "forward_kl", alpha: float = 1.0) -> Tensor:
        teacher = DenseTeacher(self.teacher_hidden, self.teacher_head)
        return distill_loss(self.hidden, self.head, self.labels, targets=teacher, alpha=alpha, divergence=divergence,
                            normalizer=self.tokens)[0]  # fmt: skip

    def torch_ce(self) -> Tensor:
        return F.cross_entropy((self.hidden @ self.head.T).float(), self.labels)

    def torch_dense_kl(self) -> Tensor:
        student = torch.log_softmax((self.hidden @ self.head.T).float(), 1)
        with torch.no_grad():
            teacher = torch.log_softmax((self.teacher_hidden @ self.teacher_head.T).float(), 1)
        return F.kl_div(student, teacher, reduction="batchmean", log_target=True)

    def liger_ce(self) -> Tensor:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        return LigerFusedLinearCrossEntropyLoss()(self.head, self.hidden, self.labels)

    def liger_jsd(self) -> Tensor:
        from liger_kernel.transformers import LigerFusedLinearJSD

        return LigerFusedLinearJSD(0.5)(self.hidden, self.head, self.teacher_hidden, self.teacher_head, self.labels)

    def trl(self, beta: float) -> Tensor:
        from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

        loss, _ = ChunkedDivergenceFunction.apply(self.hidden, self.head, None, self.teacher_hidden, self.teacher_head,
                                                  None, beta)  # fmt: skip
        return loss.sum() / self.tokens

    def gradients(self, loss: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
        self.hidden.grad = self.head.grad = None
        loss().backward()
        found = self.hidden.grad, self.head.grad
        self.hidden.grad = self.head.grad = None
        return found


def time_ms(step: Callable[[], object], repeats: int) -> float:
    """Median of `repeats` after three unmeasured ones, by the device's own clock."""
    for _ in range(3):
        step()
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        step()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def products_ms(problem: Problem, repeats: int) -> tuple[float, float]:
    """The three bare products, and the teacher's."""
    hidden, head, vocab = problem.hidden.detach(), problem.head.detach(), problem.vocab
    block = min(problem.tokens, 8192)  # the largest whose logits fit beside everything else
    logits = torch.empty(block, vocab, dtype=torch.bfloat16, device="cuda")
    head_grad = torch.empty_like(head)

    def student() -> None:
        for rows in hidden.split(block):
            torch.mm(rows, head.T, out=logits)
            torch.mm(logits, head)
            torch.mm(logits.T, rows, out=head_grad)

    def teacher() -> None:
        for rows in problem.teacher_hidden.split(block):
            torch.mm(rows, problem.teacher_head.T, out=logits)

    return time_ms(student, repeats), time_ms(teacher, repeats)


def cost(problem: Problem, loss: Callable[[], Tensor], repeats: int) -> tuple[float, float]:
    """(milliseconds, GiB above the inputs) of forward and backward."""

    def step() -> None:
        problem.hidden.grad = problem.head.grad = None
        loss().backward()

    problem.hidden.grad = problem.head.grad = None
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    extra = torch.cuda.max_memory_allocated() - before
    milliseconds = time_ms(step, repeats)
    problem.hidden.grad = problem.head.grad = None
    torch.cuda.empty_cache()
    return milliseconds, extra / GIB


def exact_gradients(problem: Problem) -> tuple[Tensor, Tensor]:
    """Of the dense forward KL, in float64 throughout."""
    hidden, head = problem.hidden.detach().double(), problem.head.detach().double()
    hidden_grad, head_grad = torch.empty_like(hidden), torch.zeros_like(head)
    for rows in torch.arange(problem.tokens, device="cuda").split(256):
        teacher = torch.softmax(problem.teacher_hidden[rows].double() @ problem.teacher_head.T.double(), 1)
        grad = (torch.softmax(hidden[rows] @ head.T, 1) - teacher) / problem.tokens
        hidden_grad[rows] = grad @ head
        head_grad.addmm_(grad.T, hidden[rows])
    return hidden_grad, head_grad


def exact_sparse_gradients(problem: Problem) -> tuple[Tensor, Tensor]:
    """Of 0.9 K+1 KL + 0.1 cross-entropy, in float64 throughout."""
    hidden, head, cached = problem.hidden.detach().double(), problem.head.detach().double(), problem.cached
    hidden_grad, head_grad = torch.empty_like(hidden), torch.zeros_like(head)
    for rows in torch.arange(problem.tokens, device="cuda").split(256):
        p = torch.softmax(hidden[rows] @ head.T, 1)
        ids, mass, tail = cached.ids_NK[rows], cached.logprobs_NK[rows].double().exp(), cached.tail_N[rows].double()
        support = p.gather(1, ids)
        outside = 1 - support.sum(1)
        total = (mass.sum(1) + tail).unsqueeze(1)
        grad = 0.9 * (total - (tail / outside).unsqueeze(1)) * p
        grad.scatter_(1, ids, 0.9 * (total * support - mass))
        grad += 0.1 * p
        grad.scatter_add_(1, problem.labels[rows].unsqueeze(1), torch.full_like(tail, -0.1).unsqueeze(1))
        grad /= problem.tokens
        hidden_grad[rows] = grad @ head
        head_grad.addmm_(grad.T, hidden[rows])
    return hidden_grad, head_grad


def error(found: tuple[Tensor, Tensor], exact: tuple[Tensor, Tensor]) -> list[float]:
    """Relative Frobenius error of the hidden and of the head gradient."""
    return [_distance(a, b) / b.norm().item() for a, b in zip(found, exact)]


def _distance(a: Tensor, b: Tensor) -> float:
    return sum((x.double() - y).square().sum().item() for x, y in zip(a.split(8192), b.split(8192))) ** 0.5


def run_shape(shape: tuple[int, int, int], repeats: int, peers: bool, curve: bool) -> list[dict]:
    label, problem = "x".join(map(str, shape)), Problem(*shape)
    three, teacher = products_ms(problem, repeats)
    rows = [row(f"products/{label}/ms", three, "ms"), row(f"teacher_product/{label}/ms", teacher, "ms")]

    def add(name: str, loss: Callable[[], Tensor], bare: float, peer: bool = False) -> None:
        try:
            milliseconds, extra = cost(problem, loss, repeats)
        except torch.cuda.OutOfMemoryError:
            print(f"{name}/{label}: does not fit", flush=True)
            torch.cuda.empty_cache()
            return
        except ImportError as missing:
            print(f"{name}/{label}: {missing}", flush=True)
            return
        memory_goal = "<= 3.2" if name == "sparse_kl_tail_ce" and shape == SHAPES[0] else None
        rows.append(row(f"{name}/{label}", milliseconds / bare, "x products", goal=GOALS.get(name), peer=peer))
        rows.append(row(f"{name}/{label}/ms", milliseconds, "ms", peer=peer))
        rows.append(row(f"{name}/{label}/extra_gib", extra, "GiB", goal=memory_goal, peer=peer))
        print(f"{name}/{label}: {milliseconds:.2f} ms {milliseconds / bare:.3f}x {extra:.2f} GiB", flush=True)

    add("sparse_kl_tail_ce", problem.sparse, three)
    add("dense_kl_online", problem.dense, three + teacher)
    add("dense_jsd_online", lambda: problem.dense("jsd"), three + teacher)
    if peers:
        add("torch_ce", problem.torch_ce, three, peer=True)
        add("torch_dense_kl_online", problem.torch_dense_kl, three + teacher, peer=True)
        add("liger_fused_ce", problem.liger_ce, three, peer=True)
        add("liger_fused_jsd_online", problem.liger_jsd, three + teacher, peer=True)
        add("trl_chunked_kl_online", lambda: problem.trl(0.0), three + teacher, peer=True)
        add("trl_chunked_jsd_online", lambda: problem.trl(0.5), three + teacher, peer=True)
    if curve:
        for tokens, compact in CURVE:
            options = {"chunk_tokens": tokens, "accumulate": torch.bfloat16 if compact else None}
            name = f"sparse_kl_tail_ce_{'compact' if compact else 'exact'}_{tokens}_tokens"
            add(name, lambda options=options: problem.sparse(**options), three)
        rows += errors(problem, label, peers)
    return rows


def errors(problem: Problem, label: str, peers: bool) -> list[dict]:
    """Gradient errors of the dense KL (ours and TRL's) and of the cached loss, by how the head's gradient adds up."""
    rows = []

    def add(name: str, loss: Callable[[], Tensor], exact: tuple[Tensor, Tensor], peer: bool = False) -> None:
        try:
            found = error(problem.gradients(loss), exact)
        except ImportError:
            return
        for part, value in zip(("hidden", "head"), found):
            rows.append(row(f"gradient_error/{name}/{label}/{part}", value, "relative", peer=peer))
        print(f"gradient error {name}: hidden {found[0]:.2e} head {found[1]:.2e}", flush=True)

    exact = exact_gradients(problem)
    add("dense_kl_online", problem.dense, exact)
    if peers:
        add("trl_chunked_kl_online", lambda: problem.trl(0.0), exact, peer=True)
        add("torch_dense_kl_online", problem.torch_dense_kl, exact, peer=True)
    del exact
    exact = exact_sparse_gradients(problem)
    add("sparse_kl_tail_ce", problem.sparse, exact)
    add("sparse_kl_tail_ce_compact_512_tokens",
        lambda: problem.sparse(chunk_tokens=512, accumulate=torch.bfloat16), exact)  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["x".join(map(str, shape)) for shape in SHAPES],
                        help="tokens x hidden x vocabulary, as 8192x5120x151936")  # fmt: skip
    parser.add_argument("--repeats", type=int, default=10)
    args = parser.parse_args()
    rows = []
    for index, text in enumerate(args.shapes):
        shape = tuple(int(size) for size in text.split("x"))
        rows += run_shape(shape, args.repeats, peers=index < 2, curve=index == 0)
        torch.cuda.empty_cache()
    question = "What do LM head and distillation loss cost over the matrix products they cannot avoid?"
    print(write("loss", question, rows, device=torch.cuda.get_device_name(), commit=commit()))


if __name__ == "__main__":
    main()
