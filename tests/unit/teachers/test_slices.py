"""A slice of a checkpoint's tensor is that part of the whole tensor, bit for bit, and costs no byte more."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from fp8_checkpoint import BLOCK, quantise, quantised_copy
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from sampling_models import deepseek, qwen3

from distill.checkpoints import check_checkpoint
from distill.errors import ModelError
from distill.records import CaptureSpec
from distill.split import Split
from teachers.engine import TeacherEngine
from teachers.runner import Runner, Segment
from teachers.scaled import ScaledWeights
from teachers.shard import load
from teachers.slices import CHUNK_ELEMENTS, LoadReport, Part, Piece, SliceReader, block_of, fill

torch.set_num_threads(1)
BUNDLED = Path(__file__).parents[3] / "teachers" / "tiny" / "teacher"


def whole(weight: torch.Tensor, scale: torch.Tensor, block: tuple[int, int] = BLOCK) -> torch.Tensor:
    """The whole tensor, widened as the format says: every element times the scale of its block."""
    rows, columns = weight.shape
    by_element = scale.repeat_interleave(block[0], 0)[:rows].repeat_interleave(block[1], 1)[:, :columns]
    return weight.float() * by_element


def read(reader: SliceReader, name: str, dtype: torch.dtype, rows: Part, columns: Part) -> torch.Tensor:
    target = torch.full((len(rows), len(columns)), torch.nan, dtype=dtype)
    fill(reader, [Piece(target, name, rows, columns)], LoadReport())
    return target


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Matrices whose sizes do and do not divide into blocks; 576 and 144 are those that are easily got wrong."""
    folder, generator = tmp_path_factory.mktemp("weights"), torch.Generator().manual_seed(0)
    tensors = {}
    for rows, columns in ((256, 384), (576, 200), (144, 130), (1, 129), (128, 1)):
        weight = torch.randn(rows, columns, generator=generator) * torch.logspace(-3, 3, columns)
        tensors[f"m{rows}"], tensors[f"m{rows}_scale_inv"] = quantise(weight)
        tensors[f"p{rows}"] = weight.bfloat16()
    save_file(tensors, folder / "model.safetensors")
    return folder


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_slice_of_fp8_weights_is_that_part_of_the_whole(folder, data):
    name = data.draw(st.sampled_from(["m256", "m576", "m144", "m1", "m128"]))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16]))
    stored = load_file(folder / "model.safetensors")
    wanted = whole(stored[name], stored[name + "_scale_inv"])
    (r0, r1), (c0, c1) = (
        sorted(data.draw(st.lists(st.integers(0, n), min_size=2, max_size=2, unique=True))) for n in wanted.shape
    )
    rows, columns = Part(r0, r1, wanted.shape[0]), Part(c0, c1, wanted.shape[1])
    found = read(SliceReader(folder, BLOCK), name, dtype, rows, columns)
    assert torch.equal(found, wanted[r0:r1, c0:c1].to(dtype))


def test_slices_of_144_rows_differ_from_the_scale_guessed_by_division(folder):
    """144 rows have two blocks of rows, 128 and 16: halves of 72 rows would be another tensor."""
    stored = load_file(folder / "model.safetensors")
    wanted = whole(stored["m144"], stored["m144_scale_inv"])
    guessed = whole(stored["m144"], stored["m144_scale_inv"], (72, 128))
    found = read(SliceReader(folder, BLOCK), "m144", torch.float32, Part.whole(144), Part.whole(130))
    assert torch.equal(found, wanted) and not torch.equal(found, guessed)


@pytest.mark.parametrize("chunk", [1, 7, 300, CHUNK_ELEMENTS])
@pytest.mark.parametrize("name", ["m576", "p576"])
def test_chunks_change_nothing(folder, monkeypatch, chunk, name):
    monkeypatch.setattr("teachers.slices.CHUNK_ELEMENTS", chunk)
    rows, columns = Part(130, 400, 576), Part(60, 140, 200)
    stored = load_file(folder / "model.safetensors")
    wanted = whole(stored["m576"], stored["m576_scale_inv"]) if name == "m576" else stored["p576"].float()
    found = read(SliceReader(folder, BLOCK), name, torch.float32, rows, columns)
    assert torch.equal(found, wanted[130:400, 60:140])


def test_bytes_read_are_those_of_the_slice_and_its_scales(folder):
    reader, report = SliceReader(folder, BLOCK), LoadReport()
    rows, columns = Part(130, 250, 576), Part(0, 129, 200)
    fill(reader, [Piece(torch.empty(120, 129), "p576", rows, columns)], report)
    assert report.bytes_read == 2 * 120 * 129
    fill(reader, [Piece(torch.empty(120, 129), "m576", rows, columns)], report)
    assert report.bytes_read == 2 * 120 * 129 + 120 * 129 + 4 * 1 * 2  # one block of rows, two of columns
    assert report.seconds > 0


@pytest.mark.parametrize(
    ("piece", "message"),
    [
        (lambda: Piece(torch.empty(576, 201), "p576"), r"p576 has shape \[576, 200\], the model wants \[576, 201\]"),
        (lambda: Piece(torch.empty(4, 200), "p576", Part(0, 4, 577)), r"the model wants \[577, 200\]"),
        (lambda: Piece(torch.empty(576), "p576"), "has shape"),
        (lambda: Piece(torch.empty(2, 2), "absent"), "1 weights are missing"),
    ],
)
def test_a_tensor_that_does_not_fit_the_model_is_an_error(folder, piece, message):
    with pytest.raises(ModelError, match=message) as error:
        fill(SliceReader(folder, BLOCK), [piece()], LoadReport())
    assert str(folder) in str(error.value) and error.value.remedy


def test_fp8_without_its_scales_or_with_too_few_is_an_error(tmp_path):
    weight, scale = quantise(torch.randn(300, 130))
    for tensors, block in (({"m": weight}, BLOCK), ({"m": weight, "m_scale_inv": scale[:2]}, BLOCK)):
        save_file(tensors, tmp_path / "model.safetensors")
        with pytest.raises(ModelError, match="_scale_inv"):
            fill(SliceReader(tmp_path, block), [Piece(torch.empty(300, 130), "m")], LoadReport())
    save_file({"m": weight, "m_scale_inv": scale}, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match="weight_block_size"):
        fill(SliceReader(tmp_path), [Piece(torch.empty(300, 130), "m")], LoadReport())


def test_only_block_scaled_fp8_is_read(tmp_path):
    good = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 64]}
    assert block_of({}, tmp_path) is None and block_of({"quantization_config": good}, tmp_path) == (128, 64)
    for change in ({"quant_method": "awq"}, {"weight_block_size": None}, {"weight_block_size": [0, 128]}):
        with pytest.raises(ModelError, match="quantised"):
            block_of({"quantization_config": good | change}, tmp_path)


@pytest.fixture(scope="module")
def fp8_teacher(tmp_path_factory):
    return quantised_copy(BUNDLED, tmp_path_factory.mktemp("fp8"))


def test_an_fp8_checkpoint_loads_to_the_widened_weights_on_one_rank(fp8_teacher):
    engine = TeacherEngine(fp8_teacher)
    stored = {}
    for file in fp8_teacher.glob("*.safetensors"):
        stored |= load_file(file)
    fp8 = {name: t for name, t in stored.items() if t.dtype == torch.float8_e4m3fn}
    assert len(fp8) > 250  # every matrix of attention, dense MLP and experts
    model = dict(engine.model.named_parameters())
    for name in ("model.layers.2.self_attn.kv_a_proj_with_mqa.weight", "model.layers.0.mlp.up_proj.weight"):
        assert torch.equal(model[name], whole(fp8[name], stored[name + "_scale_inv"]))
    gate, up = (f"model.layers.3.mlp.experts.5.{part}.weight" for part in ("gate_proj", "up_proj"))
    wanted = torch.cat([whole(fp8[name], stored[name + "_scale_inv"]) for name in (gate, up)])
    assert torch.equal(model["model.layers.3.mlp.experts.gate_up_proj"][5], wanted)
    bias = "model.layers.3.mlp.gate.e_score_correction_bias"
    assert torch.equal(engine.model.get_buffer(bias), stored[bias].float())
    assert engine.loaded.report.bytes_read == sum(t.nbytes for t in stored.values())
    assert engine.loaded.report.held_bytes >= 4 * sum(p.numel() for p in engine.model.parameters())


def test_an_fp8_teacher_says_nearly_what_the_teacher_says(fp8_teacher):
    plain, fp8 = TeacherEngine(BUNDLED, batch_size=4), TeacherEngine(fp8_teacher, batch_size=4)
    ids = plain.tokenizer.encode("<|user|>What is 3 + 4?<|assistant|><think>\n3 + 4 = 7</think>\n7")
    one, other = (engine.score([(ids[:8], ids[8:])], CaptureSpec(8, 0.0))[0] for engine in (plain, fp8))
    gap = abs(one.logsumexp_T - other.logsumexp_T)
    assert 0 < gap.max() < 1.0  # three bits of mantissa are lost, no more


def test_weights_stay_tied_in_a_model_that_is_built_empty(tmp_path):
    """A tied head has no tensor of its own in the file, and none in memory."""
    model = qwen3()
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    loaded = load(config, tmp_path, torch.float32, torch.device("cpu"), Split())
    assert loaded.model.lm_head.weight is loaded.model.model.embed_tokens.weight
    ids = torch.arange(20)[None]
    with torch.inference_mode():
        assert torch.equal(loaded.model(ids).logits, model(ids).logits)


def test_a_model_built_empty_and_filled_equals_the_one_transformers_loads(tmp_path):
    model = deepseek()
    for layer in model.model.layers[1:]:
        layer.mlp.gate.e_score_correction_bias.normal_(0, 0.1)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    loaded = load(config, tmp_path, torch.float32, torch.device("cpu"), Split()).model
    for name, wanted in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], wanted), name
    ids = torch.arange(40).view(2, 20)
    with torch.inference_mode():
        assert (loaded(ids).logits - model(ids).logits).abs().max() < 1e-4


def test_experts_kept_in_fp8_hold_half_of_bfloat16_and_compute_the_widened_logits(fp8_teacher):
    config, ids = check_checkpoint(fp8_teacher), torch.arange(40, 90)
    logits, held = {}, {}
    for keep in (False, True):
        loaded = load(config, fp8_teacher, torch.float32, torch.device("cpu"), Split(), keep_fp8=keep)
        experts = loaded.model.model.layers[2].mlp.experts
        assert isinstance(experts.gate_up_proj, ScaledWeights) == keep
        held[keep] = loaded.report.held_bytes
        runner = Runner(loaded.model)
        logits[keep] = runner.logits(runner.finish(runner.prefill(ids, torch.arange(50), [Segment(0, 50)], None, None)))
    routed = sum(
        tensor.nbytes
        for file in fp8_teacher.glob("*.safetensors")
        for name, tensor in load_file(file).items()
        if ".experts." in name and tensor.dtype == torch.float8_e4m3fn
    )
    assert held[False] - held[True] >= 2.9 * routed  # four bytes become one, and a factor for 16,384
    assert torch.equal(logits[False], logits[True])


def test_experts_are_not_kept_in_fp8_where_one_is_stored_otherwise(fp8_teacher, tmp_path):
    mixed = tmp_path / "mixed"
    shutil.copytree(fp8_teacher, mixed)
    name = "model.layers.3.mlp.experts.5.up_proj.weight"
    file = next(file for file in mixed.glob("*.safetensors") if name in load_file(file))
    save_file({k: t.float().bfloat16() if k == name else t for k, t in load_file(file).items()}, file)
    with pytest.raises(ModelError, match=r"experts\.5\.up_proj\.weight is not FP8"):
        load(check_checkpoint(mixed), mixed, torch.float32, torch.device("cpu"), Split(), keep_fp8=True)
