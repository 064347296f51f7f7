"""How a training ends when something goes wrong late: no step is lost, and a person is told what it was."""

import json

import pytest
import torch
from student_world import Folder, files_of_at_most, make_traces, settings

from distill.config import stage_spec
from distill.errors import CapacityError, DistillError, StoreError
from distill.store import RunFolder
from distill.tokens import load_tokenizer
from distill.tracking import Tracker
from students import failures
from students.checkpoint import newest_checkpoint
from students.log import TrainLog
from students.train import train_student


def train(world, out, ranks, **changes):
    config = settings(world / "model", "response", **changes)
    run = RunFolder(world, "run", commit="test")
    with Tracker(config, out) as tracker:
        return train_student(config, config.students[0], run.stage("traces"), None, Folder(out), ranks, tracker)


def rows(out):
    return (out / "log.jsonl").read_text().splitlines()


def test_an_export_that_fails_costs_no_step(world, ranks, tmp_path):
    (tmp_path / "model").write_text("in the way")
    with pytest.raises(StoreError):
        train(world, tmp_path, ranks, checkpoint_steps=1000)
    before = rows(tmp_path)
    assert newest_checkpoint(tmp_path / "checkpoints")[1]["step"] == len(before)
    (tmp_path / "model").unlink()
    counts = train(world, tmp_path, ranks, checkpoint_steps=1000)
    assert rows(tmp_path) == before and counts["steps"] == len(before)  # their times too: none was made again
    assert counts["loss"] == json.loads(before[-1])["loss"] and (tmp_path / "model" / "config.json").is_file()


def test_a_checkpoint_that_fails_ends_the_training_before_the_next_is_due(world, ranks, tmp_path):
    with files_of_at_most(10_000), pytest.raises(StoreError, match="could not be written to its end"):
        train(world, tmp_path, ranks, epochs=20, checkpoint_steps=20)
    assert 20 <= len(rows(tmp_path)) < 40


def test_everybody_may_read_what_is_exported(world, ranks, tmp_path):
    train(world, tmp_path, ranks, epochs=1)
    modes = {path.name: oct(path.stat().st_mode) for path in (tmp_path / "model").iterdir()}
    assert len(set(modes.values())) == 1 and modes["model.safetensors"] == oct((tmp_path / "train.json").stat().st_mode)


@pytest.mark.parametrize(("fate", "words"), [("drop", "left out"), ("split", "cut into rows")])
def test_traces_that_are_too_long_are_told(world, ranks, tmp_path, capsys, fate, words):
    lengths = [len(t.prompt_ids) + len(t.completion_ids) - 1 for t in kept_traces(world)]
    limit = sorted(lengths)[-4]  # shorter than some of the longest
    counts = train(world, tmp_path, ranks, epochs=1, max_seq_tokens=limit, batch_tokens=4 * limit, too_long=fate)
    assert counts["too_long"] == sum(length > limit for length in lengths) > 0
    said = capsys.readouterr().out
    assert f"small: {counts['too_long']} of traces are longer than {limit} tokens: {words}" in said
    assert (counts["trained_tokens"] == sum(len(t.completion_ids) for t in kept_traces(world))) is (fate == "split")


def kept_traces(world):
    return [trace for trace in make_traces(load_tokenizer(world / "model"), 24) if trace.keep]


def test_how_often_is_evaluated_may_change_on_the_way():
    """It changes no weight; which traces are held out does, and is refused."""
    specs = [
        stage_spec(settings("m", **changes), "train", "small")
        for changes in ({}, {"eval_steps": 7}, {"eval_traces": 3})
    ]
    assert specs[0] == specs[1] != specs[2]


class Silent:
    """A tracker of curves that nobody looks at."""

    def log(self, *_: object, **__: object) -> None:
        pass


def test_only_the_step_that_jumps_is_a_spike_and_is_told_with_its_traces(ranks, tmp_path, capsys):
    def row(step: int, loss: float) -> dict:
        return {"step": step, "loss": loss, "grad_norm": 1.0}

    losses = [2.0 - step / 100 + 0.05 * (step % 3) for step in range(1, 41)]
    losses[30] = 9.0
    log = TrainLog(tmp_path, ranks, Silent(), "small")
    log.go_on_after(0)
    for step, loss in enumerate(losses[:35], 1):
        log.write(row(step, loss), [[f"trace-{step}/0"], ["other/0"]])
    spikes = tmp_path / "spikes.jsonl"
    (spike,) = map(json.loads, spikes.read_text().splitlines())
    assert (spike["step"], spike["traces"]) == (31, [["trace-31/0"], ["other/0"]]) and spike["loss_z"] > 8
    assert f"step 31: the loss 9 stands out by {spike['loss_z']:.3g} deviations" in capsys.readouterr().out
    again = TrainLog(tmp_path, ranks, Silent(), "small")
    again.go_on_after(30)  # a launch that resumes before the spike writes it once more, not twice
    for step, loss in enumerate(losses[30:], 31):
        again.write(row(step, loss), [[f"trace-{step}/0"], ["other/0"]])
    assert [json.loads(line) for line in spikes.read_text().splitlines()] == [spike]


# --- failures in words ---------------------------------------------------------------------------------------------


def test_too_little_memory_is_told_with_what_needs_less(ranks):
    config = settings("m", micro_batch_tokens=384).train
    with pytest.raises(CapacityError) as error, failures.in_words("small", config, ranks):
        torch.empty(1 << 55, dtype=torch.uint8)
    said = str(error.value)
    assert said.startswith("student small, rank 0 of 1: there is too little memory")
    assert "train.micro_batch_tokens=96, train.activation_checkpointing=true" in said and "zero_stage" not in said
    spec = stage_spec(settings("m"), "train", "small")["train"]
    named = [each.split("=")[0].strip(" ,") for each in said.split("train.")[1:]]
    assert len(named) >= 3 and not spec.keys() & set(named)  # a training goes on with any of them
    with pytest.raises(CapacityError), failures.in_words("small", config, ranks):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")


def test_a_lost_rank_is_told_and_other_errors_stay_what_they_are(ranks):
    config = settings("m").train
    said = "[../third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:16018.\nGLHF!"
    with pytest.raises(DistillError) as error, failures.in_words("small", config, ranks):
        raise RuntimeError(said)
    assert "another rank stopped or hangs" in str(error.value) and "Read the first error of another" in str(error.value)
    assert not error.value.own and "GLHF" not in str(error.value)
    with pytest.raises(DistillError), failures.in_words("small", config, ranks):
        raise torch.distributed.DistBackendError("NCCL error: remote process exited or there was a network error")
    for other in (RuntimeError("shapes differ"), KeyError("x"), StoreError("disk")):
        with pytest.raises(type(other)) as same, failures.in_words("small", config, ranks):
            raise other
        assert same.value is other
