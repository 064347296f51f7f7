"""Laws of the prompts stage: training and evaluation share no content; every row read is kept or counted."""

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest

from distill.config import Prompts
from distill.errors import DataError, DistillError, StoreError
from distill.prompts import COUNTED, collect, load_prompts, make_prompts, normalised, source_hashes, special_of
from distill.store import RunFolder, StageFolder
from distill.tasks.split import split_of

FATES = [name for name in COUNTED if name not in ("read", "short")]


def jsonl(path: Path, rows: list, **settings) -> SimpleNamespace:
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    fields = {"prompt_field": "problem", "answer_field": "answer", "grader": "math", "limit": None}
    return SimpleNamespace(kind="jsonl", path=str(path), **fields | settings)


def rows_of(*problems: str) -> list[dict]:
    return [{"problem": problem, "answer": "1"} for problem in problems]


def config(train: list, evaluation: list, max_train: int | None = None) -> SimpleNamespace:
    return SimpleNamespace(train=train, eval=evaluation, max_train=max_train)


def gym(families, seed: int = 0, levels=(1,), **other) -> SimpleNamespace:
    return SimpleNamespace(kind="reasoning_gym", families=families, seed=seed, levels=list(levels), **other)


def texts(prompts) -> list[str]:
    return [prompt.text for prompt in prompts]


def test_repeats_and_overlaps_are_dropped_and_counted_per_source(tmp_path):
    first = jsonl(tmp_path / "a.jsonl", rows_of("A is?", "B is?", "A  is?", "What is  3+4 ?", "C is?", "e, IS"))
    second = jsonl(tmp_path / "b.jsonl", rows_of("B is?", "D is?"))
    held_out = jsonl(tmp_path / "e.jsonl", rows_of("What is 3 + 4", "E is?", "C is?", "C is?"))
    evaluation, train, counts = collect(config([first, second], [held_out]))
    assert texts(evaluation) == ["What is 3 + 4", "E is?", "C is?"]
    assert texts(train) == ["A is?", "B is?", "D is?"]
    zero = dict.fromkeys(COUNTED, 0)
    assert counts == [
        {"split": "eval", "source": held_out.path, **zero, "read": 4, "kept": 3, "duplicate": 1},
        # "A  is?" repeats; "What is  3+4 ?", "C is?" and "e, IS" are in the evaluation set
        {"split": "train", "source": first.path, **zero, "read": 6, "kept": 2, "duplicate": 1, "overlapping": 3},
        {"split": "train", "source": second.path, **zero, "read": 2, "kept": 1, "duplicate": 1},
    ]


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("What is 3+4 ?", "what is 3 + 4"),
        ("Solve:  “x² = 4”.", 'solve "x^2=4"'),
        ("A well-known fact; true!", "a well known fact, TRUE"),
        ("Compute $2 × 5$.", "Compute 2 * 5"),
        ("Sort 1, 2, -3.", "sort 1,2,-3"),
        ("Café", "Cafe\u0301"),
        ("６ − 2", "6 - 2"),
    ],
)
def test_case_spacing_and_sentence_punctuation_do_not_make_another_question(a, b):
    assert normalised(a) == normalised(b)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("What is 3 + 4?", "What is 3 - 4?"),
        ("3 * 4", "3 / 4"),
        ("(3 + 4) * 2", "3 + 4 * 2"),
        ("1.5 + 1", "15 + 1"),
        (".5", "5"),
        ("Sort 1, 23", "Sort 12, 3"),
        ("Sort 1, 2", "Sort 1 2, 0"),
        ("Sort 1, -2", "Sort 1, 2"),
        ("5! =", "5 ="),
        ("n! =", "n ="),
        ("(n+1)! =", "(n+1) ="),
        ("x² = 4", "x2 = 4"),
        ("x - y", "x y"),
        ("20% of 5", "20 of 5"),
        ("a < b", "a > b"),
    ],
)
def test_signs_that_carry_a_value_make_another_question(a, b):
    assert normalised(a) != normalised(b)


def test_generated_training_and_evaluation_prompts_are_split_by_content_for_any_seeds():
    train_source, eval_source = gym(["chain_sum", "gcd"], 5, (1, 2), per_family=31), gym({"chain_sum": 9, "gcd": 8}, 5)
    evaluation, train, counts = collect(config([train_source], [eval_source]))
    assert len(evaluation) == 17 and len(train) == 62
    assert {split_of(prompt) for prompt in evaluation} == {"heldout"} and {split_of(p) for p in train} == {"train"}
    assert len({prompt.key for prompt in evaluation + train}) == 79
    # 31 = 16 at the first level + 15 at the second
    per_cell = [
        sum(p.family == f and p.level == level for p in train) for f in ("chain_sum", "gcd") for level in (1, 2)
    ]
    assert per_cell == [16, 15, 16, 15]
    assert all(count["overlapping"] == count["short"] == 0 for count in counts)
    assert counts[0]["other_split"] > counts[0]["kept"], "nine in ten candidates belong to training"


def test_two_generators_with_the_same_seed_still_give_different_prompts():
    _, train, counts = collect(config([gym({"chain_sum": 20}, 3), gym({"chain_sum": 20}, 3)], [gym({"gcd": 2})]))
    assert len({prompt.key for prompt in train}) == 40
    assert counts[2]["duplicate"] >= 20 and counts[2]["kept"] == 20


def test_a_generator_that_has_too_few_problems_is_counted_as_short():
    # count_bits at level 1 asks about the numbers 1 to 63: 63 prompts in all
    evaluation, train, counts = collect(config([gym({"count_bits": 100})], [gym({"count_bits": 30})]))
    assert len(evaluation) + len(train) == 63
    assert counts[0]["short"] == 30 - len(evaluation) and counts[1]["short"] == 100 - len(train)
    _, _, counts = collect(config([gym({"count_bits": 200, "gcd": 1}, levels=(1, 2))], [gym({"count_bits": 1})]))
    assert counts[1]["short"] == 201 - counts[1]["kept"] > 0


def test_every_row_read_has_exactly_one_fate(tmp_path):
    file = jsonl(tmp_path / "a.jsonl", rows_of(*"ABCDEFGHAB"))
    sources = [gym({"gcd": 40, "count_bits": 70}, 1), file, gym({"gcd": 40}, 1)]
    _, train, counts = collect(config(sources, [jsonl(tmp_path / "e.jsonl", rows_of("C"))], max_train=20))
    assert all(count["read"] == sum(count[fate] for fate in FATES) for count in counts)
    assert sum(count["kept"] for count in counts if count["split"] == "train") == len(train) == 20
    assert counts[2]["read"] == 10 and counts[2]["duplicate"] == 2 and counts[2]["overlapping"] == 1


def test_max_train_takes_a_fair_share_of_every_source_and_keeps_their_order(tmp_path):
    sources = [jsonl(tmp_path / f"{name}.jsonl", rows_of(*(f"{name} {i}" for i in range(400)))) for name in "ab"]
    held_out = [jsonl(tmp_path / "e.jsonl", rows_of("e"))]
    _, every, _ = collect(config(sources, held_out))
    _, train, counts = collect(config(sources, held_out, max_train=200))
    # 200 of 800: 100 of each expected, standard deviation sqrt(200 * 1/4 * 600/799) = 6.1
    assert 75 <= counts[1]["kept"] <= 125 and counts[1]["kept"] + counts[2]["kept"] == len(train) == 200
    assert counts[1]["over_max"] + counts[2]["over_max"] == 600
    assert train == [prompt for prompt in every if prompt in train]
    _, fewer, _ = collect(config(sources, held_out, max_train=50))
    assert set(texts(fewer)) <= set(texts(train)), "a smaller budget is a part of a larger one"


def test_a_file_keeps_the_fields_it_names(tmp_path):
    row = {"q": " What is 2+2? ", "a": 4, "other": [1]}
    source = jsonl(tmp_path / "my set.jsonl", [row, "", row | {"q": "z", "a": 0.5}], prompt_field="q", answer_field="a")
    _, train, _ = collect(config([source], [jsonl(tmp_path / "e.jsonl", rows_of("e"))]))
    assert [(p.text, p.answer, p.grader, p.family) for p in train] == [
        ("What is 2+2?", "4", "math", "my set"),
        ("z", "0.5", "math", "my set"),
    ]
    source.family = "sums"
    source.limit = 1
    _, train, counts = collect(config([source], [jsonl(tmp_path / "e.jsonl", rows_of("e"))]))
    assert texts(train) == ["What is 2+2?"] and train[0].family == "sums" and counts[1]["read"] == 1


GOOD = {"problem": "x", "answer": "1"}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"problem": "y", "solution": "s"}, r"no field 'answer'; the fields are problem, solution.*answer_field"),
        ({"answer": "1"}, r"no field 'problem'.*prompt_field"),
        ({"problem": "  \n", "answer": "1"}, r"the field 'problem' is blank"),
        ({"problem": "y", "answer": ""}, r"the field 'answer' is blank"),
        ({"problem": "y", "answer": None}, r"the field 'answer' is blank"),
        ({"problem": "y", "answer": ["1"]}, r"'answer' is not text"),
        ({"problem": "y", "answer": True}, r"'answer' is not text"),
        ('{"problem": "y", "answer": NaN}', r"'answer' is no finite number"),
        ('{"problem": "y", "answer": 1e400}', r"'answer' is no finite number"),
        ('{"problem": "y\\ud800", "answer": "1"}', r"'problem' holds half a character"),
        ('{"problem": "y", "answer": "\\udfff"}', r"'answer' holds half a character"),
        ('{"problem": "y", ', "is not JSON"),
        ('["y", "1"]', "is not a JSON object"),
    ],
)
def test_a_row_that_cannot_be_used_names_file_line_field_and_remedy(tmp_path, row, message):
    path = tmp_path / "a.jsonl"
    sources = config([jsonl(path, [GOOD, GOOD, row])], [jsonl(tmp_path / "e.jsonl", rows_of("e"))])
    with pytest.raises(DataError, match=f"^{re.escape(str(path))} line 3: .*{message}") as caught:
        collect(sources)
    assert caught.value.remedy


@pytest.mark.parametrize(
    ("grader", "fine", "answer"),
    [("integer", ["12", "-1,234", 4.0], "4.5"), ("number", ["1/2", "-.5", 1e-7], "about 3"), ("number", ["7"], "1e-3")],
)
def test_an_answer_that_its_grader_cannot_read_is_told_before_anything_is_sampled(tmp_path, grader, fine, answer):
    good = [{"problem": f"p{i}", "answer": each} for i, each in enumerate(fine)]
    held_out = [jsonl(tmp_path / "e.jsonl", rows_of("e"))]
    _, train, _ = collect(config([jsonl(tmp_path / "good.jsonl", good, grader=grader)], held_out))
    assert len(train) == len(fine)
    source = jsonl(tmp_path / "a.jsonl", [*good, {"problem": "x", "answer": answer}], grader=grader)
    with pytest.raises(DataError, match=rf"line {len(fine) + 1}: the answer is not a plain {grader}.*{answer}"):
        collect(config([source], held_out))


def test_numbers_are_written_as_graders_read_them(tmp_path):
    rows = [{"problem": f"p{i}", "answer": each} for i, each in enumerate((1e-07, 2.5e-5, 1e20, 0.1, 3, -4.0))]
    held_out = jsonl(tmp_path / "e.jsonl", rows_of("e"))
    _, train, _ = collect(config([jsonl(tmp_path / "a.jsonl", rows, grader="number")], [held_out]))
    answers = [prompt.answer for prompt in train]
    assert answers == ["0.0000001", "0.000025", "100000000000000000000", "0.1", "3", "-4.0"]


def test_a_prompt_with_a_special_token_of_any_model_is_left_out_and_counted(tmp_path):
    special = special_of(["teachers/tiny/teacher", "teachers/tiny/student-qwen", "teachers/tiny/teacher"])
    assert {"<|user|>", "<|end|>"} <= special and "<think>" not in special
    source = jsonl(tmp_path / "a.jsonl", rows_of("A", "B <|end|> C", "<|user|>", "<think>"))
    held_out = jsonl(tmp_path / "e.jsonl", rows_of("E", "F<|end|>"))
    evaluation, train, counts = collect(config([source], [held_out]), special)
    assert (texts(evaluation), texts(train)) == (["E"], ["A", "<think>"])
    assert [(row["special"], row["read"]) for row in counts] == [(1, 2), (2, 4)]
    with pytest.raises(DataError, match=r"the training set is empty \(1 read, of them 1 with a special token"):
        collect(config([jsonl(tmp_path / "b.jsonl", rows_of("x <|end|>"))], [held_out]), special)


@pytest.mark.parametrize(
    ("template", "said"),
    [("{{ x.y }}", "does not take a question and an answer"), ("Hi<|end|>", "leaves out what 'user' says")],
)
def test_a_model_whose_chat_template_takes_no_question_is_told_with_the_prompts(tmp_path, template, said):
    shutil.copytree("teachers/tiny/student-qwen", tmp_path / "m", ignore=shutil.ignore_patterns("*.safetensors"))
    (tmp_path / "m" / "chat_template.jinja").write_text(template)
    with pytest.raises(DistillError, match=f"/m: the chat template {said}"):
        special_of(["teachers/tiny/teacher", str(tmp_path / "m")])


def test_bytes_that_are_no_text_name_the_line(tmp_path):
    source = jsonl(tmp_path / "a.jsonl", [GOOD])
    Path(source.path).write_bytes(b'{"problem": "x", "answer": "1"}\n{"problem": "\xff", "answer": "1"}\n')
    with pytest.raises(DataError, match="line 2: is not JSON"):
        collect(config([source], [jsonl(tmp_path / "e.jsonl", rows_of("e"))]))


def test_empty_sides_and_total_overlap_are_errors(tmp_path):
    some, none = jsonl(tmp_path / "a.jsonl", rows_of("A", "B")), jsonl(tmp_path / "none.jsonl", [])
    with pytest.raises(DataError, match=r"prompts\.eval: the evaluation set is empty"):
        collect(config([some], [none]))
    with pytest.raises(DataError, match=r"prompts\.train: the training set is empty \(0 read\)"):
        collect(config([none], [some]))
    with pytest.raises(DataError, match="all 2 training prompts that were read are also in the evaluation set"):
        collect(config([some], [some]))


def test_a_file_that_cannot_be_read_is_told_with_its_path(tmp_path):
    unreadable = "/proc/self/mem"  # whoever reads it at its beginning gets an I/O error, root too
    with pytest.raises(DataError, match=f"{unreadable}: cannot be read: Input/output error"):
        source_hashes(config([hf(unreadable)], [gym({"gcd": 1})]))


@pytest.fixture
def run(tmp_path):
    with RunFolder(tmp_path / "runs", "demo", commit="c") as folder:
        yield folder


def opened(run: RunFolder, section) -> StageFolder:
    return run.stage("prompts").open({}, source_hashes(section))


def test_the_stage_writes_what_load_prompts_reads_and_is_then_done(run, tmp_path):
    section = Prompts.model_validate(
        {
            "train": [
                {"kind": "reasoning_gym", "families": {"gcd": 5}, "levels": [1, 3], "seed": 2},
                {"kind": "jsonl", "path": jsonl(tmp_path / "a.jsonl", rows_of("A", "é \\frac{1}{2}")).path},
            ],
            "eval": [{"kind": "reasoning_gym", "families": ["gcd", "products"], "per_family": 2, "levels": [2]}],
        }
    )
    stage = opened(run, section)
    counts = make_prompts(SimpleNamespace(prompts=section), stage)
    evaluation, train, sources = collect(section)
    assert load_prompts(stage, "train") == train and load_prompts(stage, "eval") == evaluation
    assert counts == {"train": 7, "eval": 4, "sources": sources} == stage.manifest["counts"]
    assert train[0].metadata.keys() == {"seed", "index"} and train[6].text == "é \\frac{1}{2}"
    assert [shard.name for shard in stage.shards()] == ["eval.parquet", "train.parquet"]
    assert opened(run, section).done and stage.manifest["wall_s"] > 0


def test_a_damaged_prompt_file_is_made_again_with_the_same_content(run, tmp_path):
    section = config([gym({"gcd": 5})], [gym({"gcd": 2})])
    stage = opened(run, section)
    make_prompts(SimpleNamespace(prompts=section), stage)
    before, train = stage.manifest_hash, stage.path / "train.parquet"
    train.write_bytes(train.read_bytes()[:-1])
    with pytest.raises(StoreError, match=f"Delete {train}"):
        load_prompts(stage, "train")
    train.unlink()
    again = opened(run, section)
    assert not again.done
    make_prompts(SimpleNamespace(prompts=section), again)
    assert again.done and again.manifest_hash == before, "later stages stay valid"


def test_an_edited_source_file_is_noticed(run, tmp_path):
    source, held_out = jsonl(tmp_path / "a.jsonl", rows_of("A")), jsonl(tmp_path / "e.jsonl", rows_of("E"))
    folder = hf(tmp_path / "folder")
    Path(folder.path).mkdir()
    (Path(folder.path) / "x.parquet").write_bytes(b"1")
    section = config([source, folder], [held_out])
    opened(run, section).write_shard("train.parquet", lambda path: path.write_bytes(b"x"))
    for edited, text in ((source.path, "B"), (folder.path + "/x.parquet", "2")):
        before = Path(edited).read_bytes()
        Path(edited).write_text(text)
        with pytest.raises(StoreError, match=rf"inputs\.{re.escape(str(tmp_path))}/.* is .*--restart prompts"):
            opened(run, section)
        Path(edited).write_bytes(before)
        opened(run, section)


def test_a_missing_file_is_an_error_before_the_stage_is_opened(run, tmp_path):
    source = jsonl(tmp_path / "a.jsonl", rows_of("A"))
    Path(source.path).unlink()
    for missing in (source, hf(tmp_path / "none"), hf(Path("none.parquet"))):
        with pytest.raises(DataError, match=f"^{re.escape(missing.path)}: there is no such file"):
            opened(run, config([missing], [missing]))
    assert not (run.path / "1-prompts").exists()
    assert source_hashes(config([hf(Path("org/name"))], [gym({"gcd": 1})])) == {}, "the Hub is not asked"


def hf(path: Path, split: str = "train", **settings) -> SimpleNamespace:
    fields = {"prompt_field": "problem", "answer_field": "answer", "grader": "math", "limit": None, "subset": None}
    return SimpleNamespace(kind="hf", path=str(path), split=split, **fields | settings)


@pytest.fixture
def table(tmp_path, monkeypatch) -> datasets.Dataset:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return datasets.Dataset.from_list([*rows_of("A", "B", "C"), {"problem": "D", "answer": "4"}])


def test_a_dataset_is_read_from_a_parquet_file_a_folder_of_parquet_and_a_saved_folder(table, tmp_path):
    folder = tmp_path / "parquet"
    folder.mkdir()
    table.to_parquet(folder / "train-00000-of-00001.parquet")
    table.select([0]).to_parquet(folder / "test-00000-of-00001.parquet")
    table.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": table, "test": table.select([0])}).save_to_disk(tmp_path / "saved_dict")
    parquet = folder / "train-00000-of-00001.parquet"
    for path in (parquet, folder, tmp_path / "saved", tmp_path / "saved_dict"):
        evaluation = jsonl(tmp_path / "e.jsonl", rows_of("E"))
        _, train, counts = collect(config([hf(path, limit=3)], [evaluation]))
        assert texts(train) == ["A", "B", "C"] and counts[1]["read"] == 3
    for path in (folder, tmp_path / "saved_dict"):
        evaluation, train, _ = collect(config([hf(path)], [hf(path, "test")]))
        assert texts(evaluation) == ["A"] and texts(train) == ["B", "C", "D"] and train[2].answer == "4"


def test_a_dataset_that_cannot_be_used_names_path_split_and_remedy(table, tmp_path):
    table.to_parquet(tmp_path / "t.parquet")
    held_out = [jsonl(tmp_path / "e.jsonl", rows_of("E"))]
    with pytest.raises(DataError, match=r"t\.parquet split train: has no column question; it has problem, answer"):
        collect(config([hf(tmp_path / "t.parquet", prompt_field="question")], held_out))
    datasets.DatasetDict({"train": table}).save_to_disk(tmp_path / "saved")
    table.save_to_disk(tmp_path / "alone" / "saved")
    for saved in (tmp_path / "saved", tmp_path / "alone" / "saved"):
        with pytest.raises(DataError, match="saved: has no split test; it has train"):
            collect(config([hf(saved, "test")], held_out))
    datasets.Dataset.from_list([GOOD, GOOD | {"answer": None}]).to_parquet(tmp_path / "blank.parquet")
    with pytest.raises(DataError, match=r"blank\.parquet split train row 1: the field 'answer' is blank"):
        collect(config([hf(tmp_path / "blank.parquet")], held_out))
