"""Laws of agreement: 0 for the teacher itself, the full KL with a full support, and never more than the full KL."""

import math

import numpy as np
import pytest
import torch
from eval_world import answer, byte_tokenizer, merged_tokenizer, open_run, pair_tokenizer, run_eval, sums
from transformers import LlamaConfig, LlamaForCausalLM

from distill.align_spans import ALIGNED
from distill.align_tables import PairTables
from distill.align_targets import BucketTargets
from distill.errors import DataError
from distill.evals.agreement import POSITION_EDGES, TeacherTrace, agreement, dense_scorer
from distill.evals.closeness import divergence
from distill.evals.teacher_text import teacher_traces
from distill.records import CaptureSpec, TokenDists

TOK = byte_tokenizer()
VOCAB = len(TOK)


def sparse(logits_TV, kept, sampled_T=None):
    """The TokenDists of dense logits that keep the `kept` most likely tokens of each position."""
    logprobs_TV = np.asarray(logits_TV, np.float64) - np.logaddexp.reduce(logits_TV, axis=-1, keepdims=True)
    ids_TK = np.argsort(-logprobs_TV, axis=-1)[:, :kept]
    stored_TK = np.take_along_axis(logprobs_TV, ids_TK, -1)
    tokens = len(logprobs_TV)
    tail_T = np.maximum(1 - np.exp(stored_TK).sum(-1), 0) if kept < logprobs_TV.shape[1] else np.zeros(tokens)
    return TokenDists(
        np.arange(tokens + 1, dtype=np.int64) * kept,
        ids_TK.ravel().astype(np.int32),
        stored_TK.ravel().astype(np.float32),
        tail_T.astype(np.float32),
        np.zeros(tokens, np.float32),
        (ids_TK[:, 0] if sampled_T is None else np.asarray(sampled_T)).astype(np.int32),
    )


def full_kl(teacher_TV, student_TV):
    """sum_V t log(t / p) of each position in float64."""
    t = np.asarray(teacher_TV, np.float64) - np.logaddexp.reduce(teacher_TV, axis=-1, keepdims=True)
    p = np.asarray(student_TV, np.float64) - np.logaddexp.reduce(student_TV, axis=-1, keepdims=True)
    return (np.exp(t) * (t - p)).sum(-1)


def pair(tokens=40, vocab=50, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(tokens, vocab)) * 3, rng.normal(size=(tokens, vocab)) * 3


def token_agreement(student_TV, dists, where=""):
    """The measure where both have one tokenizer: every bucket is a token."""
    ids = np.arange(1 + int(dists.ids_S.max()), dtype=np.int32)
    tables = PairTables(np.array(True), np.arange(len(ids) + 1), ids, ids, np.zeros(len(ids), bool), ids)
    kinds, labels = np.full(len(dists), ALIGNED, np.uint8), dists.sampled_T.astype(np.int64)
    targets = BucketTargets(dists.offsets_T1, dists.ids_S, dists.logprobs_S, dists.tail_T, kinds, labels)
    return divergence(student_TV, targets, tables, where)


def trace(logits_TV, key="t", kept=5):
    """A completion of one-byte tokens without an end."""
    dists = sparse(logits_TV, kept)
    return TeacherTrace(key, "Why?", dists.sampled_T.tolist(), dists, CaptureSpec(kept, 0.0))


def measure(traces, students):
    return agreement("s", traces, lambda pairs: iter(students), teacher=TOK, own=TOK)


def test_kl_by_hand():
    # Teacher 1/2, 1/4 kept, tail 1/4; student 1/4, 1/4 and 1/2 outside: 1/2 ln 2 + 0 + 1/4 ln (1/4 / 1/2) = 1/4 ln 2.
    dists = sparse(np.log([[0.5, 0.25, 0.125, 0.125]]), kept=2)
    kl_T, same_T = token_agreement(np.log(np.array([[0.25, 0.25, 0.2, 0.3]])), dists)
    assert kl_T[0] == pytest.approx(0.25 * math.log(2), abs=1e-6)
    assert same_T[0] == 0.0  # the student's most likely token is the last one


def test_the_teacher_agrees_with_itself():
    teacher_TV, _ = pair()
    for kept in (1, 5, 50):
        kl_T, same_T = token_agreement(torch.tensor(teacher_TV), sparse(teacher_TV, kept))
        assert np.abs(kl_T).max() < 1e-6 and same_T.all()


def test_full_support_gives_the_full_divergence():
    teacher_TV, student_TV = pair(seed=1)
    kl_T, _ = token_agreement(student_TV, sparse(teacher_TV, 50))
    np.testing.assert_allclose(kl_T, full_kl(teacher_TV, student_TV), atol=1e-5)


def test_a_partial_support_never_overstates_and_approaches_the_full_divergence():
    teacher_TV, student_TV = pair(tokens=200, seed=2)
    previous = np.zeros(200)
    for kept in (1, 3, 10, 30, 49):
        kl_T, _ = token_agreement(student_TV, sparse(teacher_TV, kept))
        assert (kl_T > -1e-6).all() and (kl_T >= previous - 1e-5).all()
        previous = kl_T
    assert (previous <= full_kl(teacher_TV, student_TV) + 1e-5).all()
    np.testing.assert_allclose(previous, full_kl(teacher_TV, student_TV), atol=1e-5)


def test_logits_and_log_probabilities_are_the_same_input():
    teacher_TV, student_TV = pair(seed=3)
    shifted_TV = student_TV + np.arange(40)[:, None]
    a, b = (token_agreement(x, sparse(teacher_TV, 5))[0] for x in (student_TV, shifted_TV))
    np.testing.assert_allclose(a, b, atol=1e-4)


def test_the_students_scores_are_left_unchanged_and_chunks_do_not_matter():
    teacher_TV, student_TV = pair(tokens=700, seed=4)  # three chunks of 256
    scores = torch.tensor(student_TV, dtype=torch.float32)
    before = scores.clone()
    kl_T, same_T = token_agreement(scores, sparse(teacher_TV, 5))
    assert torch.equal(scores, before)
    parts = [token_agreement(student_TV[i : i + 7], sparse(teacher_TV[i : i + 7], 5)) for i in range(0, 700, 7)]
    np.testing.assert_allclose(kl_T, np.concatenate([p[0] for p in parts]), atol=1e-5)
    np.testing.assert_array_equal(same_T, np.concatenate([p[1] for p in parts]))


def test_a_student_that_leaks_all_its_mass_outside_the_support_pays_for_it():
    teacher_V, student_V = np.full(50, -20.0), np.zeros(50)
    teacher_V[0] = 0.0
    student_V[0] = -30.0
    kl_T, _ = token_agreement(student_V[None], sparse(teacher_V[None], 1))
    assert kl_T[0] == pytest.approx(full_kl(teacher_V[None], student_V[None])[0], rel=1e-3)
    assert kl_T[0] > 30


def test_token_and_byte_means_weigh_tokens_not_traces():
    (teacher_a, student_a), (teacher_b, student_b) = pair(10, seed=5), pair(30, seed=6)
    row = measure([trace(teacher_a, "a"), trace(teacher_b, "b")], [student_a, student_b])
    nats = sum(token_agreement(s, sparse(t, 5))[0].sum() for t, s in ((teacher_a, student_a), (teacher_b, student_b)))
    assert row["kl_per_token"]["value"] == pytest.approx(nats / 40)
    assert row["bits_per_byte"]["value"] == pytest.approx(nats / 40 / math.log(2))
    assert (row["traces"], row["tokens"], row["covered_share"]) == (2, 40, 1.0)


def test_positions_are_bucketed_without_loss():
    traces, students = zip(*(pair(length, seed=length) for length in (3, 20, 70)))
    row = measure([trace(t, str(i)) for i, t in enumerate(traces)], students)
    buckets = row["by_position"]
    assert [b["from"] for b in buckets] == [0, 16, 32, 64] and buckets[-1]["to"] == 128
    # 3 + 16 + 16 tokens below 16; 4 + 16; 32; 6.
    assert [b["tokens"] for b in buckets] == [35, 20, 32, 6]
    total = sum(b["kl_per_token"]["value"] * b["tokens"] for b in buckets)
    assert total / 93 == pytest.approx(row["kl_per_token"]["value"])
    assert tuple(sorted(set(POSITION_EDGES))) == POSITION_EDGES


def test_intervals_are_those_of_traces_not_of_tokens():
    # Two traces, each the same at all its 20 tokens: an interval over 40 tokens would be far too narrow.
    teacher_TV = np.log(np.tile([0.5, 0.3, 0.2], (20, 1)))
    students = [np.log(np.tile([q, (1 - q) * 0.6, (1 - q) * 0.4], (20, 1))) for q in (0.3, 0.6)]
    row = measure([trace(teacher_TV, key, kept=1) for key in "ab"], students)
    a, b = (-math.log(2) - (math.log(q) + math.log(1 - q)) / 2 for q in (0.3, 0.6))
    kl = row["kl_per_token"]
    assert kl["value"] == pytest.approx((a + b) / 2, abs=1e-6)
    assert kl["ci_high"] - kl["value"] == pytest.approx(12.7062 * abs(a - b) / 2, rel=1e-4)
    assert kl["ci_low"] == 0.0
    students[1][:, 2] = (
        5.0  # agrees with the teacher in one trace of two: an interval of [0.5 - 6, 0.5 + 6] but for bounds
    )
    top1 = measure([trace(teacher_TV, key, kept=1) for key in "ab"], [teacher_TV, students[1]])["top1"]
    assert top1 == {"value": 0.5, "ci_low": 0.0, "ci_high": 1.0}


def byte_probabilities(rng, alphabet):
    """A memoryless source over these bytes and the end token, float64 [V]."""
    p_V = np.zeros(VOCAB)
    p_V[[*alphabet, END]] = rng.dirichlet(np.ones(len(alphabet) + 1))
    return p_V


END = TOK.convert_tokens_to_ids("<|end|>")


def test_students_of_two_tokenizers_that_are_one_model_over_bytes_get_one_figure():
    """The teacher's tokens are pairs of bytes, the student's are bytes; both are sources whose byte probabilities are
    known, so bits per byte must come out as if both had byte tokens."""
    rng, letters = np.random.default_rng(11), [TOK.convert_tokens_to_ids(c) for c in "abc"]
    pairs = pair_tokenizer("abc")
    p_V, q_V = byte_probabilities(rng, letters), byte_probabilities(rng, letters)
    ids = [i for i in (pairs.convert_tokens_to_ids(a + b) for a in "abc" for b in "abc")]
    # The teacher writes pairs of letters, or ends: never one letter alone.
    joint = {pairs.convert_tokens_to_ids(a + b): p_V[i] / (1 - p_V[END]) * (1 - p_V[END]) * p_V[j] / (1 - p_V[END])
             for a, i in zip("abc", letters) for b, j in zip("abc", letters)}  # fmt: skip
    joint[pairs.convert_tokens_to_ids("<|end|>")] = p_V[END]
    assert sum(joint.values()) == pytest.approx(1)
    order = sorted(joint, key=joint.get, reverse=True)
    drawn = [rng.choice(order, p=[joint[i] for i in order]) for _ in range(6)]
    drawn = [i for i in drawn if i in ids]
    dists = TokenDists(
        np.arange(len(drawn) + 1) * len(order), np.tile(order, len(drawn)).astype(np.int32),
        np.tile(np.log([joint[i] for i in order]), len(drawn)).astype(np.float32), np.zeros(len(drawn), np.float32),
        np.zeros(len(drawn), np.float32), np.array(drawn, np.int32),
    )  # fmt: skip
    seen = []

    def score(sequences):
        for _, completion_ids in sequences:
            seen.append(completion_ids)
            yield np.log(np.tile(np.maximum(q_V, 1e-30), (len(completion_ids), 1)))

    one = TeacherTrace("t", "Why?", drawn, dists, CaptureSpec(64, 0.0))
    row = agreement("s", [one], score, teacher=pairs, own=TOK)
    assert TOK.decode(seen[0]) == pairs.decode(drawn) and len(seen[0]) == 2 * len(drawn)
    kl = lambda p, q: sum(a * math.log(a / b) for a, b in zip(p, q) if a)  # noqa: E731
    first = kl(p_V[[*letters, END]], q_V[[*letters, END]])
    inside = p_V[letters] / (1 - p_V[END])  # no end inside a pair; the student does not know that
    expected = (first + kl(inside, q_V[letters])) / 2 / math.log(2)
    assert row["bits_per_byte"]["value"] == pytest.approx(expected, rel=1e-5)
    assert (row["tokens"], row["covered_share"]) == (2 * len(drawn), 1.0)
    counts = row["coverage"][-1]
    assert (counts["text"], counts["aligned"], counts["inner"]) == ("all", len(drawn), len(drawn))


def test_a_position_without_a_distribution_is_counted_and_left_out():
    # "ab" + "c" against "a" + "bc": inside "ab" stands "bc", which both hold, so it is not what the teacher said.
    teacher, own = merged_tokenizer(("a", "b"), ("b", "c")), merged_tokenizer(("b", "c"))
    drawn = [teacher.convert_tokens_to_ids("ab"), teacher.convert_tokens_to_ids("c")]
    dists = TokenDists(
        np.array([0, 1, 2]), np.array(drawn, np.int32), np.zeros(2, np.float32), np.zeros(2, np.float32),
        np.zeros(2, np.float32), np.array(drawn, np.int32),
    )  # fmt: skip
    scores = np.log(np.full((2, len(own)), 1 / len(own)))
    one = TeacherTrace("t", "Why?", drawn, dists, CaptureSpec(64, 0.0))
    row = agreement("s", [one], lambda sequences: iter([scores]), teacher=teacher, own=own)
    assert (row["tokens"], row["covered_share"]) == (1, 0.5)
    counts = row["coverage"][-1]
    assert counts["aligned"] == 1 and sum(v for k, v in counts.items() if k not in ("text", "aligned", "inner")) == 1
    # Only the byte of "a" was measured: its distribution is certain, the student's share of it 1 / V.
    assert row["bits_per_byte"]["value"] == pytest.approx(math.log2(len(own)), rel=1e-6)
    assert [b["tokens"] for b in row["by_position"]] == [1]


@pytest.mark.parametrize("rows", [39, 41])
def test_scores_of_another_length_are_an_error(rows):
    teacher_TV, _ = pair()
    with pytest.raises(DataError, match="another number of tokens"):
        token_agreement(np.zeros((rows, 50)), sparse(teacher_TV, 5))


def test_a_vocabulary_that_lacks_a_teacher_token_is_an_error():
    teacher_TV, _ = pair()
    with pytest.raises(DataError, match="outside of the student's vocabulary"):
        token_agreement(np.zeros((40, 20)), sparse(teacher_TV, 50))


def test_a_student_that_excludes_a_teacher_token_is_an_error_not_an_infinity_in_a_mean():
    teacher_TV, student_TV = pair()
    student_TV[3] = -np.inf
    student_TV[3, np.argmin(teacher_TV[3])] = 0.0
    with pytest.raises(DataError, match="token 3"):
        token_agreement(student_TV, sparse(teacher_TV, 5), "key/0")


@pytest.mark.parametrize("batch_tokens", [1, 60, 100_000])
def test_dense_scorer_equals_one_forward_a_sequence(batch_tokens):
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    ).train()
    rng = np.random.default_rng(8)
    pairs = [(rng.integers(0, 64, p).tolist(), rng.integers(0, 64, c).tolist()) for p, c in ((3, 9), (12, 1), (5, 20))]
    scored = list(dense_scorer(model, batch_tokens)(pairs))
    assert model.training
    model.eval()
    for (prompt_ids, completion_ids), logits_TV in zip(pairs, scored, strict=True):
        with torch.no_grad():
            alone_LV = model(torch.tensor([prompt_ids + completion_ids])).logits[0]
        torch.testing.assert_close(logits_TV, alone_LV[len(prompt_ids) - 1 : -1], atol=1e-5, rtol=1e-4)


def test_teacher_traces_come_back_from_the_run_folder(tmp_path):
    tok, prompts, folder = byte_tokenizer(), sums(6), open_run(tmp_path)
    vocab = len(tok)

    def dists(ids):
        rng = np.random.default_rng(len(ids))
        logits_TV = rng.normal(size=(len(ids), vocab))
        logits_TV[np.arange(len(ids)), ids] += 12
        return sparse(logits_TV, 5)

    run_eval(folder, tok, prompts, lambda p, i: answer(p.answer), k=2, dists=dists, capture=CaptureSpec())
    traces = teacher_traces(folder, "teacher", limit=5)
    assert [t.key for t in traces] == [f"{p.key}/0" for p in prompts[:5]]
    assert [t.prompt for t in traces] == [p.text for p in prompts[:5]]
    assert (traces[0].capture.k_max, traces[0].capture.tail_bound) == (CaptureSpec().k_max, CaptureSpec().tail_bound)
    for one in traces:
        assert len(one.dists) == len(one.completion_ids) and one.dists.sampled_T.tolist() == list(one.completion_ids)


def test_teacher_traces_without_captured_distributions_say_what_to_do(tmp_path):
    tok, prompts, folder = byte_tokenizer(), sums(2), open_run(tmp_path)
    run_eval(folder, tok, prompts, lambda p, i: answer(p.answer))
    with pytest.raises(DataError, match="--restart eval"):
        teacher_traces(folder, "teacher")
