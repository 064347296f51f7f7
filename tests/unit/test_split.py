"""Laws of a model laid over ranks, and what a config may ask for."""

import json
import shutil
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from distill.capacity import FLOAT8_BYTES, GB, weight_bytes
from distill.config import check_machine, load_config, stage_spec
from distill.errors import ConfigError
from distill.geometry import parameters
from distill.plan import plan, teacher_split
from distill.split import Split, expert_problems, tensor_problems

ROOT = Path(__file__).resolve().parents[2]
R1 = ROOT / "configs" / "qwen32b.yaml"
BUNDLED = "teachers/tiny/teacher"


@st.composite
def layouts(draw) -> tuple[int, int, int]:
    small = draw(st.integers(1, 4))
    ways = [small, small * draw(st.integers(1, 4))]
    draw(st.randoms()).shuffle(ways)
    return *ways, max(ways) * draw(st.integers(1, 3))


@given(layouts())
def test_every_expert_and_head_is_held_once_in_a_copy_and_every_request_is_worked_on_once(layout):
    tensor, expert, world = layout
    splits = [Split(tensor, expert, rank, world) for rank in range(world)]
    for block in splits[0].blocks:
        copy = [splits[rank] for rank in block]
        assert all(split.block == block for split in copy)
        for held, count in (([s.tensor_rank for s in copy], tensor), ([s.expert_rank for s in copy], expert)):
            assert sorted(held) == sorted(list(range(count)) * (len(block) // count))
    assert sorted(rank for block in splits[0].blocks for rank in block) == list(range(world))
    speakers = [split.share for split in splits if split.tensor_rank == 0]
    assert speakers == list(range(splits[0].shares))
    for split in splits:  # a tensor-parallel group lies in one copy and has one share
        group = [each for each in splits if each.share == split.share]
        assert len(group) == tensor and len({each.block for each in group}) == 1


@given(layouts(), st.integers(0, 9))
def test_every_shard_is_worked_on_once_a_share_and_a_copy_takes_its_turns_together(layout, count):
    tensor, expert, world = layout
    shards = [f"{number:05d}" for number in range(count)]
    turns = [Split(tensor, expert, rank, world).turns(shards) for rank in range(world)]
    speakers = [rank for rank in range(world) if Split(tensor, expert, rank, world).tensor_rank == 0]
    assert sorted(name for rank in speakers for name in turns[rank] if name) == shards
    for block in Split(tensor, expert, 0, world).blocks:
        assert len({len(turns[rank]) for rank in block}) == 1


@given(layouts(), st.integers(1, 7))
def test_every_routed_expert_answers_once_in_a_copy_from_where_its_weights_are(layout, each):
    tensor, expert, world = layout
    splits = [Split(tensor, expert, rank, world) for rank in range(world)]
    for block in splits[0].blocks:
        answering = [splits[rank].answering_experts(each * expert) for rank in block]
        assert sorted(number for part in answering for number in part) == list(range(each * expert))
        held = [splits[rank].held_experts(each * expert) for rank in block]
        assert all(set(part) <= set(has) and len(has) == each for part, has in zip(answering, held))


@pytest.mark.parametrize(("layout", "message"), [((2, 3, 6), "one must divide"), ((1, 4, 6), "4 must divide the 6")])
def test_ranks_that_cannot_be_laid_out_are_an_error(layout, message):
    tensor, expert, world = layout
    with pytest.raises(ConfigError, match=message):
        Split(tensor, expert, 0, world)


def test_sizes_that_do_not_divide_are_named():
    sizes = {"model_type": "deepseek_v3", "num_attention_heads": 16, "num_key_value_heads": 16}
    sizes |= {"intermediate_size": 100, "moe_intermediate_size": 30, "n_routed_experts": 12}
    assert list(tensor_problems(sizes, 2)) == []
    assert [p.split(",")[0] for p in tensor_problems(sizes, 4)] == ["it must divide moe_intermediate_size"]
    assert list(expert_problems(sizes, 4)) == [] and len(list(expert_problems(sizes, 5))) == 1
    assert "no routed experts" in next(expert_problems({"model_type": "qwen3"}, 2))
    assert "gpt2 is not cut" in next(tensor_problems({"model_type": "gpt2"}, 2))


# --- Configs ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def demo(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    config = yaml.safe_load((ROOT / "configs" / "demo.yaml").read_text())
    path = tmp_path / "demo.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def ways(tensor, expert, gpus=8) -> list[str]:
    settings = {"teacher.tensor_parallel": tensor, "teacher.expert_parallel": expert, "hardware.gpus": gpus}
    return [f"{name}={value}" for name, value in settings.items()]


@pytest.mark.parametrize(
    ("tensor", "expert", "message"),
    [
        (0, 1, "teacher.tensor_parallel: 0 is neither a whole number >= 1 nor auto"),
        ("some", 1, "teacher.tensor_parallel: 'some' is neither"),
        ("auto", 2, "are auto together"),
        (3, 2, "teacher.tensor_parallel is 3; of 3 and 2 one must divide the other (hardware.gpus is 8)"),
        (1, 3, "teacher.expert_parallel is 3; 3 must divide the 8 ranks (hardware.gpus is 8)"),
        (16, 1, "must stay within a node"),
    ],
)
def test_a_split_that_contradicts_the_config_is_an_error_before_any_work(demo, tensor, expert, message):
    with pytest.raises(ConfigError) as error:
        load_config(demo, ways(tensor, expert, 16 if tensor == 16 else 8))
    assert message in str(error.value)


def test_a_split_that_does_not_divide_the_teacher_is_an_error_before_any_work(demo):
    check_machine(load_config(demo, ways(4, 8)))
    with pytest.raises(ConfigError, match=r"teacher\.tensor_parallel is 8; it must divide num_attention_heads, 4 of"):
        check_machine(load_config(demo, ways(8, 8)))
    with pytest.raises(ConfigError, match=r"it must divide num_attention_heads, 128"):
        load_config(R1, [*ways(3, 3, 48), "hardware.gpus_per_node=3"])
    with pytest.raises(ConfigError, match=r"it must divide n_routed_experts, 256"):
        load_config(R1, ways(8, 24, 48))


def test_the_run_takes_the_split_of_its_config_and_the_plan_s_where_it_says_auto(demo):
    split = teacher_split(load_config(demo, ways(2, 4)), rank=5, world=8)
    assert (split.tensor_parallel, split.expert_parallel, split.share, split.tensor_rank) == (2, 4, 2, 1)
    with pytest.raises(ConfigError, match="4 must divide the 6 ranks"):
        teacher_split(load_config(demo, ways(2, 4)), rank=0, world=6)
    chosen = teacher_split(load_config(R1), rank=0, world=32)
    row = plan(load_config(R1), gpus=32).teacher[-1]
    assert row.weights == "float8 experts"  # as its checkpoint stores them
    assert row.fits and row.layout.startswith(f"EP {chosen.expert_parallel} x TP {chosen.tensor_parallel},")
    alone = teacher_split(load_config(R1, ["teacher.url=http://localhost:1"]), rank=3, world=5)
    assert alone == Split(1, 1, 3, 5)


def test_how_the_teacher_is_split_makes_no_finished_stage_stale(demo):
    for stage in ("prompts", "traces", "logits", "eval"):
        assert stage_spec(load_config(demo, ways(2, 4)), stage) == stage_spec(load_config(demo), stage)


# --- The plan of DeepSeek-R1 ------------------------------------------------------------------------------------------


def r1_rows(gpus: int, gpu: str) -> dict:
    result = plan(load_config(R1, ["hardware.price_per_device_hour=2.0"]), gpus=gpus, gpu=gpu)
    return {row.weights: row for row in result.teacher}


@pytest.mark.parametrize(
    ("gpus", "gpu", "bfloat16_fits"), [(16, "h100", False), (8, "h200", False), (32, "a100", True)]
)
def test_r1_on_the_nodes_people_have(gpus, gpu, bfloat16_fits):
    rows = r1_rows(gpus, gpu)
    assert rows["bfloat16"].fits == bfloat16_fits
    assert ("float8 experts" in rows) == (gpu != "a100")  # which has no FP8
    for name, row in rows.items():
        element = 2 if name == "bfloat16" else FLOAT8_BYTES
        assert row.fits or name == "bfloat16"
        assert row.memory["experts"] == pytest.approx(58 * 256 * 3 * 7168 * 2048 * element / gpus)
        if row.fits:  # 800,000 samples of 7,680 tokens; what is not decoding is reading the prompts
            assert row.hours == pytest.approx(800_000 * 7680 / row.tokens_per_s / 3600, rel=0.05)
            assert row.cost == pytest.approx(row.hours * gpus * 2.0)
        else:
            assert row.hours is row.cost is row.tokens_per_s is None


def test_what_tensor_parallelism_does_not_divide_is_counted_whole():
    g = load_config(R1).teacher.geometry
    count = parameters(g)
    tables, routers, norms = 2 * 129280 * 7168, 58 * (256 * 7168 + 256), 61 * (2 * 7168 + 1536 + 512) + 7168
    assert count.whole == tables + routers + norms
    assert count.low_rank == 61 * 7168 * (1536 + 512 + 64)
    one, eight = (weight_bytes(g, 2, tp, 32)["other weights"] for tp in (1, 8))
    assert one == 2 * (count.total - count.routed)
    assert eight == pytest.approx(2 * (count.cut / 8 + count.low_rank + count.whole))
    assert eight > 9 * GB


def test_the_plan_says_what_a_split_written_down_needs_and_that_auto_would_fit(tmp_path):
    config = load_config(R1, ways(1, 8, 64))
    result = plan(config)
    assert result.teacher[0].layout == "EP 8 x TP 1, 8 copies" and not result.fits
    (said,) = [problem for problem in result.problems if problem.startswith("teacher:")]
    assert "Set teacher.tensor_parallel and teacher.expert_parallel to auto." in said
    assert plan(load_config(R1)).fits
    data = json.loads(result.to_json())
    assert [row["weights"] for row in data["teacher"]] == ["bfloat16", "float8 experts"]
    text = plan(load_config(R1)).render()
    assert "tokens/s" in text and "float8 experts" in text and max(map(len, text.splitlines())) < 200


def test_a_dense_teacher_is_planned_in_its_own_dtype_only(demo):
    folder = demo.parent / "dense"
    shutil.copytree(ROOT / "teachers/tiny/student-qwen", folder)
    result = plan(load_config(demo, [f"teacher.path={folder}"]))
    assert [row.weights for row in result.teacher] == ["bfloat16"]
