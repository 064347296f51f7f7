"""The law of training on text that the teacher only read: the student that follows the teacher is where it ends.

Teacher and student cut numbers into groups of other sizes. The teacher is a random chain over its tokens; the text is
another chain's, so that the teacher would have said something else nearly everywhere. The truth at a student's token is
found without any table: all that the teacher might go on with is written behind the text so far, the student's own
tokenizer encodes the whole, and the probabilities of what then stands there are added up. A student with these
probabilities must feel no gradient, at any position, on any text.
"""

import numpy as np
import pytest
import torch
from align_world import byte_level
from hypothesis import given, settings
from hypothesis import strategies as st
from test_align_exact import WHOLE, Chain

from distill.align import Aligner
from distill.align_spans import ALIGNED, CONTRADICTED, INNER, UNCOVERED
from distill.align_targets import pad
from distill.losses.buckets import BucketedTargets
from distill.losses.fused import distill_loss
from distill.records import TokenDists
from distill.tokens import end_id

EXACT = [(3, 1), (2, 1), (1, 2), (1, 3), (3, 3)]  # digits in a token, of the teacher and of the student
DIGITS, FAR = [b"0", b"1"], 6


def groups_of(most: int):
    """A tokenizer that takes up to so many digits at a time, and one letter; the same vocabulary of single bytes."""
    merges = []
    for size in range(1, most):
        ways = [pair for rest in _numerals(size) for d in DIGITS for pair in ((d, rest), (rest, d))]
        merges += dict.fromkeys(ways)
    return byte_level(merges, alphabet=b"01x", pattern=f"[0-9]{{1,{most}}}|[a-z]")


def _numerals(size: int) -> list[bytes]:
    return DIGITS if size == 1 else [d + rest for d in DIGITS for rest in _numerals(size - 1)]


class Spelled:
    """The law of a student's token after a teacher that is a chain, by trying everything."""

    def __init__(self, chain: Chain, student):
        self.chain, self.student = chain, student

    def law(self, ids: list[int], teacher_index: int, realised: list[int], n: int) -> torch.Tensor:
        """[V] float64: the student's token n, given the teacher's tokens before `teacher_index` and the student's
        before n."""
        mass = torch.zeros(len(self.student), dtype=torch.float64)
        self._go_on(ids[:teacher_index], 1.0, realised[:n], n, mass, FAR)
        return mass / mass.sum()

    def _go_on(self, ids: list[int], p: float, before: list[int], n: int, mass: torch.Tensor, far: int) -> None:
        ended = bool(ids) and ids[-1] == self.chain.end
        found = self._encode(ids)
        stays = max(min(n, len(found) - 1), 0)  # all but its last token are as they will be, whatever comes
        if found[:stays] != before[:stays]:
            return
        if ended or len(found) > n + 1:
            if len(found) > n and found[:n] == before:
                mass[found[n]] += p
            return
        assert far, "a token of the student is longer than expected"
        for token, q in self.chain.row(ids[-1] if ids else None).items():
            self._go_on([*ids, token], p * q, before, n, mass, far - 1)

    def _encode(self, ids: list[int]) -> list[int]:
        text = b"".join(self.chain.texts.get(t, b"") for t in ids).decode()
        found = self.student.encode(text, add_special_tokens=False)
        return found + [end_id(self.student)] * (bool(ids) and ids[-1] == self.chain.end)


def world(seed: int, groups: tuple[int, int]):
    """(teacher, student's tokenizer, alignment, targets as the loss takes them, text in the teacher's ids)"""
    rng = np.random.default_rng(seed)
    tokenizer, student = groups_of(groups[0]), groups_of(groups[1])
    teacher, writer = Chain(tokenizer, rng, canonical=True), Chain(tokenizer, rng, canonical=True)
    for chain in (teacher, writer):
        chain.texts = dict(sorted(chain.texts.items()))  # a tokenizer's own order changes from process to process
    ids = writer.sample()
    aligner = Aligner(tokenizer, student)
    alignment = aligner.align([ids])
    found, chunk_N, logp_N = aligner.read_targets(alignment, [teacher.dists(ids)])
    padded = pad(found, aligner.tables)
    four = map(torch.from_numpy, (padded.ids_NK, padded.group_NK, padded.logq_NG, padded.tail_N))
    read = torch.zeros(len(alignment), dtype=torch.bool)
    targets = BucketedTargets(*four, read, torch.from_numpy(chunk_N), torch.from_numpy(logp_N))
    return teacher, student, alignment, targets, ids


def truth(teacher, student, alignment, ids) -> torch.Tensor:
    spelled, realised = Spelled(teacher, student), alignment.ids_N.tolist()
    begins = [int(alignment.teacher_N[n]) for n in range(len(realised))]
    shared = [n for n in range(len(realised)) if alignment.depth_N[n] == 0 and alignment.kind_N[n] != 2]
    # Inside a chunk what the teacher said of it so far is known up to the chunk's beginning.
    at = [max(m for m in shared if m <= n) for n in range(len(realised))]
    return torch.stack([spelled.law(ids, begins[at[n]], realised, n) for n in range(len(realised))])


def gradient(logp_NV: torch.Tensor, labels: np.ndarray, targets: BucketedTargets) -> torch.Tensor:
    """[N, V]: dL/dlogits at a student with these log-probabilities."""
    logits = logp_NV.clamp(min=-60).requires_grad_()
    head = torch.eye(logits.shape[1], dtype=torch.float64)
    distill_loss(logits, head, torch.from_numpy(labels), targets=targets, alpha=1.0, normalizer=1)[0].backward()
    return logits.grad


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), groups=st.sampled_from(EXACT))
def test_a_student_that_follows_the_teacher_feels_nothing_on_anybodys_text(seed, groups):
    teacher, student, alignment, targets, ids = world(seed, groups)
    law_NV = truth(teacher, student, alignment, ids)
    assert gradient(law_NV.log(), alignment.ids_N, targets).abs().max() < 2e-6


def mean_pull(groups: tuple[int, int], drawn: bool) -> float:
    """The largest entry of the mean gradient at the truth, over positions of many texts."""
    total, positions = 0.0, 0
    for seed in range(10):
        teacher, student, alignment, targets, ids = world(seed, groups)
        if drawn:
            targets = BucketedTargets(targets.ids_NK, targets.group_NK, targets.logprobs_NG, targets.tail_N)
        grad_NV = gradient(truth(teacher, student, alignment, ids).log(), alignment.ids_N, targets)
        total, positions = total + grad_NV.sum(0), positions + len(grad_NV)
    return float((total / positions).abs().max())


@pytest.mark.parametrize("groups", [(1, 2), (1, 3)])
def test_the_sampled_term_would_draw_it_to_the_writer(groups):
    assert mean_pull(groups, drawn=True) > 0.02 and mean_pull(groups, drawn=False) < 1e-6


def test_a_teachers_token_that_would_run_over_the_end_of_a_chunk_is_all_that_is_missed():
    """Where both cut numbers otherwise: 01 1 is 011 to the student, and so is the beginning of 01 10."""
    assert mean_pull((2, 3), drawn=False) < 0.1 * mean_pull((2, 3), drawn=True)


@pytest.mark.parametrize("groups", [(2, 1), (3, 1)])
def test_targets_that_take_it_as_given_that_a_token_goes_on_would_too(groups):
    worst = 0.0
    for seed in range(4):
        teacher, student, alignment, _, ids = world(seed, groups)
        aligner = Aligner(teacher.tokenizer, student)
        drawn = pad(aligner.targets(alignment, [teacher.dists(ids)], WHOLE), aligner.tables)
        four = map(torch.from_numpy, (drawn.ids_NK, drawn.group_NK, drawn.logq_NG, drawn.tail_N))
        law_NV = truth(teacher, student, alignment, ids)
        read = torch.zeros(len(alignment), dtype=torch.bool)
        worst = max(worst, gradient(law_NV.log(), alignment.ids_N, BucketedTargets(*four, read)).abs().max().item())
    assert worst > 0.1


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), groups=st.sampled_from([(3, 1), (2, 1), (1, 2)]))
def test_another_student_is_drawn_to_it(seed, groups):
    """One step down the gradient from a student that mixes the truth with noise comes nearer to the truth."""
    teacher, student, alignment, targets, ids = world(seed, groups)
    law_NV = truth(teacher, student, alignment, ids)
    noise = torch.from_numpy(np.random.default_rng(seed).dirichlet(np.ones(law_NV.shape[1]), len(law_NV)))
    mixed = (0.7 * law_NV + 0.3 * noise).log()
    before, after = mixed, mixed - 0.05 * gradient(mixed, alignment.ids_N, targets)
    head = torch.eye(law_NV.shape[1], dtype=torch.float64)
    loss = [
        distill_loss(z, head, torch.from_numpy(alignment.ids_N), targets=targets, alpha=1.0, normalizer=1)[0].item()
        for z in (before, after, law_NV.clamp(min=1e-26).log())
    ]
    assert loss[0] > loss[1] > 0 and abs(loss[2]) < 1e-5


def test_identical_tokenizers_have_the_targets_of_drawn_text_and_no_chunk():
    teacher, student, alignment, targets, ids = world(4, (3, 3))
    aligner = Aligner(teacher.tokenizer, student)
    found, _, _ = aligner.read_targets(alignment, [teacher.dists(ids)])
    drawn = aligner.targets(alignment, [teacher.dists(ids)], WHOLE)
    for name in ("offsets_N1", "roots_E", "logq_E", "tail_N", "kind_N"):
        np.testing.assert_array_equal(getattr(found, name), getattr(drawn, name))
    assert (targets.chunk_N == -1).all()


def test_by_hand():
    """Of 101 the teacher says 0.2, of 10, which ends where 101 goes on, 0.6: behind 1 0 comes 1 with 1/4."""
    rng = np.random.default_rng(0)
    tokenizer, student = groups_of(3), groups_of(1)
    teacher = Chain(tokenizer, rng, canonical=True)
    of = {text: i for i, text in teacher.texts.items()}
    teacher.rows[None] = {of[b"10"]: 0.6, of[b"101"]: 0.2, of[b"x"]: 0.2}
    aligner = Aligner(tokenizer, student)
    alignment = aligner.align([[of[b"101"]]])
    found, chunk_N, _ = aligner.read_targets(alignment, [teacher.dists([of[b"101"]])])
    assert found.kind_N.tolist() == [ALIGNED, INNER, INNER] and (chunk_N == -1).all()
    np.testing.assert_allclose(np.exp(found.logq_E), [0.8, 0.2, 1.0, 0.25], rtol=1e-6)
    np.testing.assert_allclose(found.tail_N, [0, 0, 0.75], rtol=1e-6, atol=1e-7)


def test_what_the_text_says_next_changes_no_target():
    """Where it contradicts the teacher's piece (00 behind 11, of 110 and 0) the target is that of any other text."""
    tokenizer, student = groups_of(3), groups_of(2)
    teacher = Chain(tokenizer, np.random.default_rng(0), canonical=True)
    of = {text: i for i, text in teacher.texts.items()}
    teacher.rows[None] = {of[b"11"]: 0.5, of[b"110"]: 0.3, of[b"111"]: 0.2}
    aligner, found = Aligner(tokenizer, student), []
    for text in ([b"110", b"0"], [b"110", b"x"]):
        ids = [of[piece] for piece in text]
        alignment = aligner.align([ids])
        targets, _, _ = aligner.read_targets(alignment, [teacher.dists(ids)])
        found.append((alignment.kind_N[1], targets.part(1, 2)))
    assert [kind for kind, _ in found] == [CONTRADICTED, INNER]
    for _, target in found:
        assert target.kind_N.tolist() == [INNER] and target.tail_N[0] == pytest.approx(0.5)
        np.testing.assert_allclose(np.exp(target.logq_E), [0.3, 0.2], rtol=1e-6)
        assert target.roots_E.tolist() == found[0][1].roots_E.tolist()


def test_a_text_that_was_cut_short_has_no_likelihood_of_its_last_chunk():
    tokenizer, student = groups_of(1), groups_of(2)
    teacher = Chain(tokenizer, np.random.default_rng(0), canonical=True)
    of = {text: i for i, text in teacher.texts.items()}
    aligner, whole = Aligner(tokenizer, student), [of[b"1"], of[b"x"], of[b"1"], teacher.end]
    for ids, chunks in ((whole, [0, -1, 2, -1]), (whole[:-1], [0, -1, -1])):
        _, chunk_N, _ = aligner.read_targets(aligner.align([ids]), [teacher.dists(ids)])
        assert chunk_N.tolist() == chunks  # 1 might be 10 or 11: its bucket does not tell


@pytest.mark.parametrize(("tail", "kind"), [(0.005, INNER), (0.02, UNCOVERED)])
def test_where_the_tail_may_hold_what_goes_on_nothing_is_said(tail, kind):
    """Of all that begins with 1, a tenth of everything, the support holds 110 alone."""
    tokenizer, student = groups_of(3), groups_of(1)
    of = {text: i for i, text in Chain(tokenizer, np.random.default_rng(0), canonical=True).texts.items()}
    dists = TokenDists(
        np.array([0, 2]), np.array([of[b"x"], of[b"110"]], np.int32), np.log([0.9 - tail, 0.1]).astype(np.float32),
        np.array([tail], np.float32), np.zeros(1, np.float32), np.array([of[b"110"]], np.int32),
    )  # fmt: skip
    aligner = Aligner(tokenizer, student)
    targets, _, _ = aligner.read_targets(aligner.align([[of[b"110"]]]), [dists])
    assert targets.kind_N.tolist() == [ALIGNED, kind, kind]
