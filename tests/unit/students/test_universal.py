"""A checkpoint of one ZeRO stage gives another stage the same weights, moments, steps and options."""

import pytest
import torch
from student_world import settings

from distill.config_students import Adapter
from distill.errors import StoreError
from distill.store import RunFolder
from students.adapters import attach
from students.checkpoint import Checkpoints
from students.data import load_traces
from students.engine import StudentEngine
from students.model import load_student
from students.step import LossSettings, StudentStep

pytestmark = pytest.mark.timeout(300)

QUICK = [(0, 3, "float32")]  # of the others DeepSpeed's converter is a process of its own, which takes its time
ALL = [(a, b, "float32") for a in range(4) for b in range(4) if a != b] + [
    (1, 3, "bfloat16"), (3, 2, "bfloat16"), (1, 3, "lora"), (3, 0, "lora"), (0, 2, "lora"),
]  # fmt: skip


@pytest.fixture
def engines(world, ranks, tmp_path):
    made = []

    def make(stage: int, dtype: str) -> StudentEngine:
        width = torch.float32 if dtype == "lora" else getattr(torch, dtype)
        model, _ = load_student(world / "model", width)
        if dtype == "lora":
            attach(model, Adapter(kind="lora", rank=4), width, ranks.device, seed=0)
        train = settings(world / "model", zero_stage=stage, weight_decay=0.3, embedding_lr_ratio=0.5).train
        options = {"dtype": width, "micro_batches": 1, "offload_dir": tmp_path}
        made.append(StudentEngine(StudentStep(model, LossSettings()), train, ranks, **options))
        return made[-1]

    yield make
    for engine in made:
        engine.close()


@pytest.fixture(scope="module")
def data(world):
    _, tokenizer = load_student(world / "model")
    return load_traces(RunFolder(world, "run", commit="test").stage("traces"), None, tokenizer, 96)


def step(engine, data, number):
    engine.accumulate(data.collate([[number, number + 1]], 400), 50.0, last=True)
    engine.step(1e-3)


def state(engine) -> dict[str, torch.Tensor]:
    """Weights in float32 and both moments, by parameter."""
    found = {f"fp32 {name}": tensor.clone() for name, tensor in engine.whole_weights(torch.float32)}
    trained = {name: each for name, each in engine.module.model.named_parameters() if each.requires_grad}
    for name, parameter in trained.items():
        found |= {f"{part} {name}": moment(engine, parameter, part).clone() for part in ("exp_avg", "exp_avg_sq")}
    return {name: tensor.view(-1) for name, tensor in found.items()}


def moment(engine, parameter, part) -> torch.Tensor:
    from deepspeed.utils import safe_get_full_optimizer_state

    optimizer = engine._engine.optimizer
    if engine.stage == 0:
        return optimizer.state[parameter][part]
    if engine.stage == 3:
        return safe_get_full_optimizer_state(parameter, part)
    place = parameter._hp_mapping  # all of it is on the one rank, in the flat tensor of its group
    flat = optimizer.optimizer.param_groups[place.param_group_index]["params"][0]
    address = place.get_hp_fragment_address()
    return optimizer.optimizer.state[flat][part].narrow(0, address.start, address.numel)


def options(engine) -> list[dict]:
    """What the groups of parameters are trained with, apart from the rate, which is set every step."""
    groups = engine._engine.optimizer.param_groups
    return [{name: group.get(name) for name in ("weight_decay", "betas", "lr_ratio", "eps")} for group in groups]


@pytest.mark.parametrize(
    ("source", "target", "dtype"),
    [*QUICK, *(pytest.param(*each, marks=pytest.mark.slow) for each in ALL if each not in QUICK)],
)
def test_another_stage_goes_on_with_the_same_state(engines, data, ranks, tmp_path, source, target, dtype):
    first, second = engines(source, dtype), engines(target, dtype)
    before = options(second)
    for number in range(3):
        step(first, data, number)
    checkpoints = Checkpoints(tmp_path / "c", ranks, 2)
    checkpoints.save(first, 3, {"identity": {"zero_stage": first.stage}})
    checkpoints.wait()
    Checkpoints(tmp_path / "c", ranks, 2).resume(second, {"zero_stage": second.stage})
    expected, found = state(first), state(second)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert options(second) == before and (dtype == "lora" or len({str(each) for each in before}) >= 2)
    for number in range(3, 6):
        step(first, data, number)
        step(second, data, number)
    expected, found = state(first), state(second)
    for name in expected:  # the count of steps is in the bias correction of every update
        limit = 2e-5 if dtype == "bfloat16" else 1e-6
        assert (found[name] - expected[name]).abs().max() <= limit * max(1.0, expected[name].abs().max()), name


@pytest.mark.slow
def test_what_cannot_be_converted_is_refused_with_a_remedy(engines, data, ranks, tmp_path):
    first, second = engines(1, "float32"), engines(2, "float32")
    checkpoints = Checkpoints(tmp_path / "c", ranks, 2)
    step(first, data, 0)
    checkpoints.save(first, 1, {"identity": {"zero_stage": 1}})
    checkpoints.wait()
    (part,) = (tmp_path / "c" / "step-000001").glob("*_optim_states.pt")
    part.write_bytes(b"\0" * part.stat().st_size)  # of the right size, but not what was written
    with pytest.raises(StoreError, match="could not be converted") as error:
        Checkpoints(tmp_path / "c", ranks, 2).resume(second, {"zero_stage": 2})
    assert "train.zero_stage that it was written with" in str(error.value)
    assert not [path for path in (tmp_path / "c").iterdir() if path.name.startswith(".")]
