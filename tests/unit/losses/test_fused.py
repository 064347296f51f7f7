"""Laws of head and loss in one: value, gradients and metrics against plain float64, for any split, mask and option."""

import math

import loss_reference as reference
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.errors import ConfigError, DataError
from distill.losses.divergence import DIVERGENCES
from distill.losses.fused import DenseTeacher, distill_loss
from distill.losses.metrics import LossMetrics
from distill.losses.sparse import SparseTargets

INF = float("inf")
F64 = torch.float64


def random_supports(teacher_logits, sizes, generator):
    """Per row a random support of the given size; (SparseTargets, list of support id tensors)."""
    masses = torch.softmax(teacher_logits, 1)
    width = max([*sizes, 1])
    ids = torch.randint(teacher_logits.shape[1], (len(sizes), width), generator=generator)  # padding: any token at all
    logprobs, tail, supports = torch.full(ids.shape, -INF, dtype=F64), torch.ones(len(sizes), dtype=F64), []
    for n, size in enumerate(sizes):
        support = torch.randperm(teacher_logits.shape[1], generator=generator)[:size]
        slots = torch.randperm(width, generator=generator)[:size]
        ids[n, slots], logprobs[n, slots] = support, masses[n, support].log()
        tail[n] = reference.coarse(masses[n], support)[-1]
        supports.append(support)
    return SparseTargets(ids, logprobs, tail), supports


class Case:
    """One random problem: inputs in float64, the options of the call, and the reference's answer."""

    def __init__(self, seed, kind, name, beta, temperature, tokens, vocab, padded, extras):
        draw = torch.Generator().manual_seed(seed)
        normal = lambda *shape: torch.randn(*shape, generator=draw, dtype=F64)  # noqa: E731
        self.hidden, self.head = normal(tokens, 4), normal(vocab + padded, 4)
        self.bias = normal(vocab + padded) if extras else None
        self.labels = torch.randint(vocab, (tokens,), generator=draw)
        self.labels[torch.rand(tokens, generator=draw) < 0.3] = -100
        self.options = {
            "vocab_size": vocab,
            "normalizer": 3.5,
            "chunk_tokens": int(torch.randint(1, tokens + 2, (), generator=draw)),
        }
        if extras:
            self.options |= {
                "logit_scale": 0.7,
                "softcap": 3.0,
                "z_loss": 0.01,
                "weights_N": torch.rand(tokens, generator=draw, dtype=F64),
            }
        teacher_hidden, teacher_head = normal(tokens, 3), normal(vocab, 3)
        teacher_logits = teacher_hidden @ teacher_head.T
        self.pairs = None
        if kind == "sparse":
            sizes = torch.randint(vocab + 1, (tokens,), generator=draw).tolist()
            targets, supports = random_supports(teacher_logits, sizes, draw)
            self.pairs = [self._coarse_pair(teacher_logits[n], supports[n]) for n in range(tokens)]
        if kind == "dense":
            targets = DenseTeacher(teacher_hidden, teacher_head)
            self.pairs = [(torch.softmax(teacher_logits[n], 0), lambda p: p) for n in range(tokens)]
        if kind != "none":
            self.options |= {
                "targets": targets,
                "alpha": 0.8,
                "divergence": name,
                "beta": beta,
                "temperature": temperature,
            }

    @staticmethod
    def _coarse_pair(teacher_logits, support):
        return reference.coarse(torch.softmax(teacher_logits, 0), support), lambda p: reference.coarse(p, support)

    def leaves(self, dtype):
        return [
            x if x is None else x.to(dtype, copy=True).requires_grad_() for x in (self.hidden, self.head, self.bias)
        ]

    def ours(self, dtype):
        hidden, head, bias = leaves = self.leaves(dtype)
        loss, metrics = distill_loss(hidden, head, self.labels, bias_V=bias, **self.options)
        loss.backward()
        return loss.detach(), [x.grad for x in leaves if x is not None], metrics

    def expected(self):
        hidden, head, bias = leaves = self.leaves(F64)
        options, vocab = self.options, self.options["vocab_size"]
        z = reference.logits(hidden, head, bias, options.get("logit_scale", 1.0), options.get("softcap"))[:, :vocab]
        loss = reference.distill_loss(
            z,
            self.labels,
            options["normalizer"],
            pairs=self.pairs,
            alpha=options.get("alpha", 0.0),
            weights=options.get("weights_N"),
            name=options.get("divergence", "forward_kl"),
            beta=options.get("beta", 0.5),
            temperature=options.get("temperature", 1.0),
            z_loss=options.get("z_loss", 0.0),
        )
        loss.backward()
        return loss.detach(), [x.grad for x in leaves if x is not None]


CASES = st.builds(
    Case, st.integers(0, 2**31), st.sampled_from(["none", "sparse", "sparse", "dense"]), st.sampled_from(DIVERGENCES),
    st.sampled_from([0.05, 0.5, 0.9]), st.sampled_from([0.5, 1.0, 1.0, 2.0]), st.integers(1, 6), st.integers(1, 9),
    st.integers(0, 3), st.booleans(),
)  # fmt: skip


def check_against_reference(case):
    value, grads = case.expected()
    size = 1 + value.abs() + max(g.abs().max() for g in grads)
    for dtype, tolerance in ((F64, 1e-9), (torch.float32, 2e-5)):
        our_value, our_grads, _ = case.ours(dtype)
        assert our_value.dtype == dtype
        assert (our_value - value).abs() <= tolerance * size
        for ours, expected in zip(our_grads, grads):
            assert ours.dtype == dtype
            assert (ours - expected).abs().max() <= tolerance * size


@settings(max_examples=300, deadline=None)
@given(CASES)
def test_value_and_every_gradient_equal_float64_autograd(case):
    check_against_reference(case)


@pytest.mark.slow
@settings(max_examples=50_000, deadline=None)
@given(CASES)
def test_value_and_every_gradient_equal_float64_autograd_on_many_shapes(case):
    check_against_reference(case)


def sparse_problem(tokens=40, hidden=8, vocab=30, k=6, dtype=F64):
    generator = torch.Generator().manual_seed(int(torch.randint(2**31, ())))
    states, head = torch.randn(tokens, hidden, dtype=dtype), torch.randn(vocab, hidden, dtype=dtype)
    targets, _ = random_supports(torch.randn(tokens, vocab, dtype=F64), [k] * tokens, generator)
    labels = torch.randint(vocab, (tokens,))
    labels[torch.rand(tokens) < 0.4] = -100
    return states, head, labels, targets


def gradients(states, head, labels, parts, **options):
    """Loss and gradients when the tokens come in the given micro-batches."""
    states, head = states.clone().requires_grad_(), head.clone().requires_grad_()
    targets, total = options.pop("targets"), 0.0
    for part in parts:
        loss, _ = distill_loss(states[part], head, labels[part], targets=targets.rows(part), alpha=0.7, **options)
        loss.backward()
        total += loss.item()
    return total, states.grad, head.grad


@pytest.mark.parametrize("name", DIVERGENCES)
def test_gradient_is_same_for_any_chunk_microbatch_and_rank_split_with_unequal_masks(name):
    states, head, labels, targets = sparse_problem()
    labels[:10] = -100  # one micro-batch has no valid token at all
    count = int((labels != -100).sum())
    common = {"targets": targets, "normalizer": count, "divergence": name}
    whole = gradients(states, head, labels, [torch.arange(40)], chunk_tokens=4096, **common)
    for sizes in ([10, 30], [1, 9, 25, 5], [40]):
        for chunk in (1, 3, 7, None):
            split = gradients(states, head, labels, torch.arange(40).split(sizes), chunk_tokens=chunk, **common)
            for ours, expected in zip(split, whole):
                torch.testing.assert_close(torch.as_tensor(ours), torch.as_tensor(expected), rtol=1e-11, atol=1e-13)
    ranks = [gradients(states, head, labels, [torch.arange(40)[r::2]], **common) for r in range(2)]
    torch.testing.assert_close(ranks[0][1] + ranks[1][1], whole[1], rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(ranks[0][2] + ranks[1][2], whole[2], rtol=1e-11, atol=1e-13)


def test_a_batch_without_valid_tokens_gives_zero_loss_with_a_graph():
    states, head, labels, targets = sparse_problem(dtype=torch.float32)
    states.fill_(float("nan"))
    states.requires_grad_(), head.requires_grad_()
    for normalizer in (0, 17):
        for given_targets, alpha in ((targets, 1.0), (None, 0.0)):
            loss, metrics = distill_loss(
                states, head, torch.full_like(labels, -100), targets=given_targets, alpha=alpha, normalizer=normalizer
            )
            loss.backward()
            assert loss.item() == 0 and metrics.tokens == 0
            assert set(metrics.means().values()) == {0.0}
    assert (states.grad == 0).all() and (head.grad == 0).all()


def test_ignored_tokens_reach_nothing_even_when_their_states_are_nan():
    states, head, labels, targets = sparse_problem()
    ignored = labels == -100
    poisoned = states.clone()
    poisoned[ignored] = float("nan")
    common = {"targets": targets, "normalizer": 20}
    clean = gradients(states, head, labels, [torch.arange(40)], **common)
    dirty = gradients(poisoned, head, labels, [torch.arange(40)], **common)
    assert clean[0] == dirty[0]
    assert torch.equal(clean[1], dirty[1]) and torch.equal(clean[2], dirty[2])
    assert (dirty[1][ignored] == 0).all()


def test_rows_past_the_vocabulary_get_neither_mass_nor_gradient():
    states, head, labels, targets = sparse_problem()
    padded = torch.cat([head, torch.full((5, 8), 1e3, dtype=F64)])  # huge logits, were they real
    common = {"targets": targets, "normalizer": 20}
    clean = gradients(states, head, labels, [torch.arange(40)], **common)
    ours = gradients(states, padded, labels, [torch.arange(40)], vocab_size=30, **common)
    assert ours[0] == pytest.approx(clean[0], rel=1e-12)
    torch.testing.assert_close(ours[1], clean[1])
    torch.testing.assert_close(ours[2][:30], clean[2])
    assert (ours[2][30:] == 0).all()


@pytest.mark.parametrize("frozen", ["states", "head", "both"])
def test_what_is_frozen_gets_no_gradient_and_the_rest_is_unchanged(frozen):
    states, head, labels, targets = sparse_problem()
    _, states_grad, head_grad = gradients(states, head, labels, [torch.arange(40)], targets=targets, normalizer=20)
    states.requires_grad_(frozen == "head"), head.requires_grad_(frozen == "states")
    loss, _ = distill_loss(states, head, labels, targets=targets, alpha=0.7, normalizer=20)
    if frozen == "both":
        assert not loss.requires_grad
        return
    loss.backward()
    left, grad = (head, head_grad) if frozen == "states" else (states, states_grad)
    other = states if frozen == "states" else head
    torch.testing.assert_close(left.grad, grad)
    assert other.grad is None


def test_loss_is_linear_in_the_upstream_gradient_and_may_be_walked_once():
    states, head, labels, targets = sparse_problem()
    states.requires_grad_(), head.requires_grad_()
    found = []
    for factor in (1, 3):
        loss, _ = distill_loss(states, head, labels, targets=targets, alpha=0.7, normalizer=20)
        found.append(torch.autograd.grad(factor * loss, (states, head), retain_graph=True))
        with pytest.raises(RuntimeError, match="already handed out"):
            loss.backward()
    for a, b in zip(*found):
        torch.testing.assert_close(3 * a, b)


def test_tied_head_and_low_rank_update_of_the_head_get_the_gradient_of_autograd():
    _, head, labels, _ = sparse_problem()
    down, up = torch.randn(2, 8, dtype=F64), torch.randn(30, 2, dtype=F64)
    tokens = torch.randint(30, (40,))

    def leaves():
        return [x.clone().requires_grad_() for x in (head, down, up)]

    ours, plain = leaves(), leaves()
    distill_loss(ours[0][tokens], ours[0] + ours[2] @ ours[1], labels, normalizer=20)[0].backward()
    logits = plain[0][tokens] @ (plain[0] + plain[2] @ plain[1]).T
    (torch.nn.functional.cross_entropy(logits, labels, reduction="sum") / 20).backward()
    for a, b in zip(ours, plain):
        torch.testing.assert_close(a.grad, b.grad)


def test_without_targets_the_loss_is_cross_entropy():
    states, head, labels, _ = sparse_problem(dtype=torch.float32)
    loss, metrics = distill_loss(states, head, labels, normalizer=int((labels != -100).sum()))
    assert loss.item() == pytest.approx(torch.nn.functional.cross_entropy(states @ head.T, labels).item(), rel=1e-6)
    assert metrics.means()["ce"] == pytest.approx(loss.item(), rel=1e-6)
    assert metrics.teacher_tokens == 0


def test_alpha_per_token_switches_between_teacher_and_label():
    states, head, labels, targets = sparse_problem()
    alpha = (torch.arange(40) % 2).double()
    loss = distill_loss(states, head, labels, targets=targets, alpha=alpha, normalizer=10)[0]
    even, odd = labels.clone(), labels.clone()
    even[1::2], odd[::2] = -100, -100
    parts = (
        distill_loss(states, head, even, normalizer=10)[0]
        + distill_loss(states, head, odd, targets=targets, alpha=1.0, normalizer=10)[0]
    )
    torch.testing.assert_close(loss, parts)


def test_metrics_by_hand():
    """Head is the identity, so hidden states are logits. Two valid tokens, four outcomes; teacher knows tokens 0
    and 1."""
    student = torch.tensor([[0.5, 0.25, 0.125, 0.125], [0.25, 0.25, 0.25, 0.25], [0.7, 0.1, 0.1, 0.1]], dtype=F64)
    labels = torch.tensor([1, 2, -100])
    targets = SparseTargets(
        torch.tensor([[0, 1]] * 3),
        torch.tensor([[0.25, 0.5], [0.25, 0.25], [0.5, 0.4]]).log(),
        torch.tensor([0.25, 0.5, 0.1]),
    )
    _, metrics = distill_loss(
        student.log(),
        torch.eye(4, dtype=F64),
        labels,
        targets=targets,
        alpha=1.0,
        divergence="reverse_kl",
        normalizer=2,
    )
    found = {name: getattr(metrics, name).item() for name in LossMetrics.__dataclass_fields__}
    assert found == pytest.approx(
        {
            "tokens": 2,
            "ce": math.log(4) + math.log(4),
            "entropy": 1.75 * math.log(2) + math.log(4),
            "label_top1": 1,  # token 0: 1 is not the most likely; token 1: all tie
            "teacher_tokens": 2,
            "divergence": 0.5 * math.log(2) + 0.25 * math.log(0.5),
            "kl": 0.25 * math.log(0.5) + 0.5 * math.log(2),
            "top1": 1,
            "support_mass": 0.75 + 0.5,
            "student_tail": 0.25 + 0.5,
            "teacher_tail": 0.25 + 0.5,
        },
        abs=1e-6,
    )
    doubled = LossMetrics.from_tensor(metrics.as_tensor()) + metrics
    assert doubled.means()["ce"] == pytest.approx(math.log(4)) and doubled.tokens == 4


def test_dense_metrics_equal_those_of_a_full_support():
    states, head, labels, _ = sparse_problem(vocab=12)
    teacher_logits = torch.randn(40, 12, dtype=F64)
    targets = SparseTargets(
        torch.arange(12).expand(40, 12), torch.log_softmax(teacher_logits, 1), torch.zeros(40, dtype=F64)
    )
    options = {"alpha": 0.5, "divergence": "jsd", "temperature": 2.0, "normalizer": 10}
    sparse = distill_loss(states, head, labels, targets=targets, **options)
    dense = distill_loss(
        states, head, labels, targets=DenseTeacher(teacher_logits, torch.eye(12, dtype=F64)), **options
    )
    torch.testing.assert_close(sparse[0], dense[0])
    torch.testing.assert_close(sparse[1].as_tensor(), dense[1].as_tensor())


@pytest.mark.parametrize("kind", ["none", "sparse", "dense"])
def test_logits_of_ten_thousand_give_finite_loss_and_gradients(kind):
    states = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 1e4], [1e4, 1e4, 1e4]]).requires_grad_()
    head = torch.eye(3).requires_grad_()
    sparse = SparseTargets(
        torch.tensor([[1], [0], [2]]), torch.tensor([[0.9], [1.0], [0.5]]).log(), torch.tensor([0.1, 0.0, 0.5])
    )
    targets = {"none": None, "sparse": sparse, "dense": DenseTeacher(-states.detach(), torch.eye(3))}[kind]
    for name in DIVERGENCES:
        loss, metrics = distill_loss(
            states,
            head,
            torch.tensor([2, 0, 1]),
            targets=targets,
            alpha=0.0 if targets is None else 0.5,
            divergence=name,
            normalizer=3,
        )
        states.grad = head.grad = None
        loss.backward()
        assert loss.isfinite() and states.grad.isfinite().all() and head.grad.isfinite().all()
        assert metrics.as_tensor().isfinite().all()
    if kind == "none":  # CE is 1e4, 2e4 + log 2 and log 3
        assert loss.item() == pytest.approx((1e4 + 2e4 + math.log(2) + math.log(3)) / 3, rel=1e-6)


def test_half_precision_inputs_are_summed_in_float32_and_autocast_changes_nothing():
    states, head, labels, targets = sparse_problem(tokens=600, hidden=64, vocab=80)
    exact = gradients(
        states.bfloat16().double(),
        head.bfloat16().double(),
        labels,
        [torch.arange(600)],
        targets=targets,
        normalizer=300,
    )
    ours = gradients(
        states.bfloat16(),
        head.bfloat16(),
        labels,
        [torch.arange(600)],
        targets=targets,
        normalizer=300,
        chunk_tokens=50,
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = gradients(
            states.bfloat16(),
            head.bfloat16(),
            labels,
            [torch.arange(600)],
            targets=targets,
            normalizer=300,
            chunk_tokens=50,
        )
    assert ours[0] == pytest.approx(exact[0], rel=1e-5)
    for a, b, c in zip(ours[1:], exact[1:], cast[1:]):
        assert a.dtype == torch.bfloat16 and torch.equal(a, c)
        assert (a - b).abs().max() <= 2**-8 * b.abs().max()  # one rounding of the finished sum


def test_training_step_runs_inside_torch_compile():
    states, head, labels, targets = sparse_problem(dtype=torch.float32)

    def step(x, w):
        return distill_loss(x * 2, w, labels, targets=targets, alpha=0.7, normalizer=20)[0] * 2

    results = []
    for run in (step, torch.compile(step, backend="eager")):
        x, w = states.clone().requires_grad_(), head.clone().requires_grad_()
        loss = run(x, w)
        loss.backward()
        results.append((loss.detach(), x.grad, w.grad))
    for plain, compiled in zip(*results):
        torch.testing.assert_close(plain, compiled)


def test_what_cannot_be_right_is_refused_before_any_work():
    states, head, labels, targets = sparse_problem()
    with pytest.raises(DataError, match="targets is None"):
        distill_loss(states, head, labels, alpha=0.5, normalizer=20)
    with pytest.raises(ConfigError, match="alpha"):
        distill_loss(states, head, labels, targets=targets, alpha=1.5, normalizer=20)
    with pytest.raises(DataError, match=r"30 tokens.*-100"):
        distill_loss(states, head, labels.clamp(min=30), normalizer=20)
    with pytest.raises(DataError, match="token counts differ"):
        distill_loss(states, head, labels[1:], normalizer=20)
    with pytest.raises(DataError, match="outside the student's 20"):
        distill_loss(states, head, labels.clamp(max=5), targets=targets, alpha=1.0, normalizer=20, vocab_size=20)
    with pytest.raises(ConfigError, match="vocab_size"):
        distill_loss(states, head, labels, normalizer=20, vocab_size=31)
    with pytest.raises(DataError, match="fewer rows"):
        distill_loss(states, head, labels, targets=DenseTeacher(states, head[:10]), alpha=1.0, normalizer=20)
    with pytest.raises(DataError, match="global number"):
        distill_loss(states, head, labels, normalizer=0)
