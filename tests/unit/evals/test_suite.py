"""Laws of a whole evaluation, on real models: each is opened once, only when needed; a copy of the teacher agrees."""

from contextlib import contextmanager

import pytest
import torch
from eval_world import byte_tokenizer, open_run, sums
from transformers import LlamaConfig, LlamaForCausalLM

from distill.dist import Ranks
from distill.errors import DataError
from distill.evals.agreement import dense_scorer
from distill.evals.report import write_report
from distill.evals.results import Candidate, load_result
from distill.evals.retention import general_prompts
from distill.evals.suite import Entrant, Opened, Suite, run_suite
from distill.grade import Grader
from distill.records import CaptureSpec, SamplingParams
from students.rollout import Rollout


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    store = tmp_path_factory.mktemp("store") / "s"
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield Ranks(0, 1, 0, torch.device("cpu"))
    torch.distributed.destroy_process_group()


def tiny_model(seed):
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=262, max_position_embeddings=512, initializer_range=0.3, **sizes))


class World:
    """Entrants over real models; `opened` lists whose weights were asked for."""

    def __init__(self, root):
        self.folder, self.opened, self.tok = open_run(root), [], byte_tokenizer()
        other = byte_tokenizer()
        other.chat_template = other.chat_template.replace("<|end|>", "<|end|>\n")
        self.suite = Suite(
            sums(5),
            SamplingParams(temperature=1.0, top_p=1.0, max_new_tokens=12),
            k=2,
            capture=CaptureSpec(k_max=16),
            agreement_traces=4,
            retention=general_prompts(2, kinds=("copying", "facts")),
            retention_tokens=8,
            shard_prompts=2,
        )
        self.entrants = [  # out of order: the suite knows that the teacher goes first
            self.entrant("copy", "student", 0, base="base", loss="logits"),
            self.entrant("other", "student", 1, base="base", loss="response"),
            self.entrant("foreign", "student", 1, tok=other, base="base", loss="response"),
            self.entrant("base", "base", 2),
            self.entrant("teacher", "teacher", 0),
        ]

    def entrant(self, name, role, seed, tok=None, base="", loss=""):
        tok = tok or self.tok

        @contextmanager
        def load():
            self.opened.append(name)
            model = tiny_model(seed)
            yield Opened(Rollout(model, tok, batch_size=8), dense_scorer(model))

        return Entrant(Candidate(name, role, base, loss, fingerprint=str(seed)), tok, load)

    def run(self, ranks):
        self.opened.clear()
        with Grader(1) as grader:
            run_suite(self.suite, self.entrants, self.folder, grader, ranks)
        return self.opened


@pytest.fixture(scope="module")
def world(tmp_path_factory, ranks):
    world = World(tmp_path_factory.mktemp("runs"))
    assert world.run(ranks) == ["teacher", "base", "copy", "other", "foreign"]
    return world


def test_a_copy_of_the_teacher_samples_its_tokens_and_agrees_with_it(world):
    teacher, copy, other = (load_result(world.folder, name) for name in ("teacher", "copy", "other"))
    tokens = [[row["completion_ids"] for row in result.rows] for result in (teacher, copy, other)]
    assert tokens[0] == tokens[1] != tokens[2]
    report = write_report(world.folder.path.parent, {})
    rows = {row["student"]: row for row in report["agreement"]}
    assert rows["copy"]["kl_per_token"]["value"] == pytest.approx(0.0, abs=5e-4)  # as stored
    assert rows["copy"]["top1"]["value"] == 1.0 and rows["copy"]["traces"] == 4
    assert rows["other"]["kl_per_token"]["value"] > 5e-3
    assert rows["foreign"]["covered_share"] > 0.5 and rows["foreign"]["bits_per_byte"]["value"] > 0


def test_retention_is_asked_of_base_and_students_not_of_the_teacher(world):
    report = write_report(world.folder.path.parent, {})
    assert {row["model"] for row in report["retention"]} == {"base", "copy", "other", "foreign"}
    assert {row["kind"] for row in report["retention"]} == {"copying", "facts", "all"}
    assert load_result(world.folder, "base", "retention").verdict_PK.shape == (4, 1)


def test_a_finished_suite_opens_no_model(world, ranks):
    assert world.run(ranks) == []


def test_only_the_model_that_lacks_something_is_opened(world, ranks):
    eval_dir = world.folder.path
    before = load_result(world.folder, "base").rows
    (eval_dir / "eval-base-00001.parquet").unlink()
    assert world.run(ranks) == ["base"] and load_result(world.folder, "base").rows == before
    (eval_dir / "agreement-other.json").unlink()
    assert world.run(ranks) == ["other"]
    (eval_dir / "retention-copy-00000.parquet").unlink()
    assert world.run(ranks) == ["copy"]
    assert world.run(ranks) == []


def test_an_error_while_a_model_is_open_closes_it(tmp_path, ranks):
    world, closed = World(tmp_path), []

    @contextmanager
    def broken():
        class Silent:
            def sample(self, requests, params, capture):
                return iter(())

        try:
            yield Opened(Silent())
        finally:
            closed.append(True)

    world.entrants = [Entrant(Candidate("teacher", "teacher"), world.tok, broken)]
    with pytest.raises(DataError, match="ended without"):
        world.run(ranks)
    assert closed == [True]
