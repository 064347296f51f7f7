"""Traces that are too long for a row, split: every token of the completion is trained once, on its own target."""

from collections import Counter

import pytest
import torch
from student_world import make_stages, make_tokenizer, make_traces

from students.data import Example, fit, load_traces


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def test_windows_by_hand():
    # fed: 1 2 3 | 4 5 6 7 (the last token, 8, is never fed); predicted at 3: 4, at 4: 5, ... at 7: 8
    example = Example("k/0", [1, 2, 3], [4, 5, 6, 7, 8], "s", [4, 5, 6, 7, 8])
    a, b, c = example.windows(3)
    assert [w.input_ids for w in (a, b, c)] == [[1, 2, 3], [4, 5, 6], [7]]
    assert [w.labels for w in (a, b, c)] == [[4], [5, 6, 7], [8]]
    assert [w.input_tokens for w in (a, b, c)] == [3, 3, 1]
    # a window that ends before the last token of the prompt trains nothing and is left out
    assert [w.labels for w in example.windows(2)] == [[4, 5], [6, 7], [8]]
    assert [w.input_ids for w in example.windows(2)] == [[3, 4], [5, 6], [7]]


@pytest.mark.parametrize("tokens", [1, 2, 5, 17, 40, 96])
def test_every_completion_token_is_predicted_in_exactly_one_window(tokenizer, tokens):
    for trace in make_traces(tokenizer, 6, seed=3):
        example = Example("k/0", trace.prompt_ids, trace.completion_ids, "s", trace.completion_ids)
        parts = example.windows(tokens)
        assert [i for part in parts for i in part.labels] == trace.completion_ids
        assert all(part.input_tokens <= tokens and part.trained for part in parts)


def test_split_traces_keep_their_targets_and_are_counted(tokenizer, tmp_path):
    stages = make_stages(tmp_path, tokenizer, make_traces(tokenizer, 12))
    whole, cut = load_traces(*stages, tokenizer, 400), load_traces(*stages, tokenizer, 24, too_long="split")
    dropped = load_traces(*stages, tokenizer, 40)
    assert cut.counts["too_long"] == sum(n > 24 for n in whole.lengths) > 0
    assert dropped.counts["too_long"] == sum(n > 40 for n in whole.lengths) and max(dropped.lengths) <= 40
    assert max(cut.lengths) <= 24 and len(set(cut.keys)) == len(cut.keys)
    assert sum(cut.trained) == sum(whole.trained) == cut.counts["trained_tokens"]
    for i, example in enumerate(whole.examples):
        expected = whole.collate([[i]], 400)
        mine = [j for j, part in enumerate(cut.examples) if part.key == example.key]
        batch = cut.collate([[j] for j in mine], 400)
        assert batch.labels_M.tolist() == expected.labels_M.tolist()
        width = expected.targets.ids_NK.shape[1]
        assert torch.equal(batch.targets.ids_NK[:, :width], expected.targets.ids_NK)
        assert torch.equal(batch.targets.logprobs_NK[:, :width], expected.targets.logprobs_NK)
        assert torch.equal(batch.targets.tail_N, expected.targets.tail_N)
        # the token before each label is the one at its trained position
        ids = example.prompt_ids + example.completion_ids
        first = len(example.prompt_ids) - 1
        assert batch.input_ids_N[batch.trained_M].tolist() == ids[first:-1]


def test_what_fits_is_left_alone():
    short, long_ = (Example(k, [1, 2], list(range(n)), "s", list(range(n))) for k, n in (("a/0", 3), ("b/0", 9)))
    counts = Counter()
    assert fit([short, long_], 4, "drop", counts) == [short] and counts["too_long"] == 1
    assert fit([short, long_], 10, "split", counts) == [short, long_] and counts["too_long"] == 1
