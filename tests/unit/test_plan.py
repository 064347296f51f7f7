"""Laws of the plan: published sizes from geometry, hand-computed bytes, and estimates beside what was measured."""

import json

import pytest
import yaml

from distill.capacity import (
    GB,
    GPUS,
    Load,
    activation_bytes,
    longest_row,
    place,
    teacher_element,
    train_memory,
    train_seconds,
    weight_bytes,
)
from distill.config import Geometry, Train, load_config
from distill.config_students import Adapter
from distill.errors import ConfigError, ModelError
from distill.geometry import cache_bytes_per_token, forward_flops, parameters, read_geometry, train_flops
from distill.plan import plan
from distill.state_bytes import state_bytes, trained_parameters

R1 = Geometry(
    family="deepseek_v3", hidden_size=7168, layers=61, heads=128, intermediate_size=18432, vocab_size=129280,
    routed_experts=256, experts_per_token=8, moe_intermediate_size=2048, shared_experts=1, dense_layers=3,
    q_lora_rank=1536, kv_lora_rank=512, qk_rope_head_dim=64, qk_nope_head_dim=128, v_head_dim=128,
)  # fmt: skip
LITE = Geometry(
    family="deepseek_v3", hidden_size=2048, layers=27, heads=16, intermediate_size=10944, vocab_size=102400,
    routed_experts=64, experts_per_token=6, moe_intermediate_size=1408, shared_experts=2, dense_layers=1,
    kv_lora_rank=512, qk_rope_head_dim=64, qk_nope_head_dim=128, v_head_dim=128,
)  # fmt: skip
LONG = Load(prompt_tokens=200, mean_new_tokens=7680, max_new_tokens=30720, batch_size=64, samples=800_000)


def dense(family, hidden, layers, heads, kv, mlp, vocab, tied=False, head_dim=None):
    return Geometry(
        family=family, hidden_size=hidden, layers=layers, heads=heads, kv_heads=kv, intermediate_size=mlp,
        vocab_size=vocab, tie_embeddings=tied, head_dim=head_dim,
    )  # fmt: skip


QWEN_32B = dense("qwen2", 5120, 64, 40, 8, 27648, 152064)
QWEN3_1_7B = dense("qwen3", 2048, 28, 16, 8, 6144, 151936, True, 128)
QWEN3_4B = dense("qwen3", 2560, 36, 32, 8, 9728, 151936, True, 128)


# --- Geometry ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("geometry", "published"),
    [
        (dense("qwen2", 1536, 28, 12, 2, 8960, 151936, True), 1_543_714_304),  # Qwen2.5-1.5B
        (dense("qwen2", 3584, 28, 28, 4, 18944, 152064), 7_615_616_512),  # Qwen2.5-7B
        (dense("qwen2", 5120, 48, 40, 8, 13824, 152064), 14_770_033_664),  # Qwen2.5-14B
        (QWEN_32B, 32_763_876_352),
        (dense("llama", 4096, 32, 32, 8, 14336, 128256), 8_030_261_248),  # Llama-3.1-8B
        (dense("llama", 8192, 80, 64, 8, 28672, 128256), 70_553_706_496),  # Llama-3.3-70B
        (QWEN3_1_7B, 1_720_574_976),
        (QWEN3_4B, 4_022_468_096),
        (R1, 671_026_419_200),
        (LITE, 15_706_484_224 + 26 * 64),  # V2-Lite's sizes, and V3's correction bias in 26 layers
    ],
)
def test_parameters_are_those_of_the_published_checkpoints(geometry, published):
    assert parameters(geometry).total == published


def test_r1_holds_654_billion_in_routed_experts_and_uses_37_billion_a_token():
    count = parameters(R1)
    assert count.routed == 58 * 256 * 3 * 7168 * 2048
    assert count.total - count.routed == pytest.approx(17.1e9, rel=0.01)
    assert count.active == count.total - count.routed + 58 * 8 * 3 * 7168 * 2048
    assert 36.5e9 < count.multiplied < count.active < 37.6e9


def test_a_small_dense_model_counted_by_hand():
    g = dense("llama", 8, 2, 2, 1, 16, 10)
    layer = 8 * 8 + 2 * 8 * 4 + 8 * 8 + 3 * 8 * 16 + 2 * 8  # q, k and v, o, MLP, norms
    assert parameters(g).total == 2 * layer + 8 + 2 * 10 * 8
    assert parameters(g).multiplied == parameters(g).total - 10 * 8
    tied = dense("llama", 8, 2, 2, 1, 16, 10, True)
    assert (
        parameters(tied).total == parameters(g).total - 80 and parameters(tied).multiplied == parameters(g).multiplied
    )
    assert parameters(dense("qwen2", 8, 2, 2, 1, 16, 10)).total == parameters(g).total + 2 * 16  # biases 8 + 4 + 4
    assert parameters(dense("qwen3", 8, 2, 2, 1, 16, 10)).total == parameters(g).total + 2 * 8  # norms of q and k
    # Keys and values: 2 layers x 2 heads x 4 numbers, each for scores and for the sum, 2 operations.
    assert forward_flops(g, 100) - forward_flops(g, 0) == 100 * 2 * 2 * 2 * (2 * 4)
    assert train_flops(g, 100) == 3 * forward_flops(g, 50)


def test_r1_caches_70_kilobytes_a_token_however_it_is_divided():
    assert cache_bytes_per_token(R1) == 61 * 576 * 2 == 70_272
    assert cache_bytes_per_token(R1, tensor_parallel=8) == 70_272
    assert cache_bytes_per_token(QWEN_32B) == 64 * 2 * 8 * 128 * 2
    assert cache_bytes_per_token(QWEN_32B, tensor_parallel=4) == 64 * 2 * 2 * 128 * 2
    assert cache_bytes_per_token(QWEN_32B, tensor_parallel=40) == 64 * 2 * 1 * 128 * 2


@pytest.mark.parametrize("content", ["{}", "{", '{"model_type": "gpt2"}', '{"model_type": "llama"}', "[]"])
def test_a_folder_without_usable_sizes_is_a_model_error(tmp_path, content):
    with pytest.raises(ModelError, match=r"no .*config\.json"):
        read_geometry(tmp_path, "teacher.path")
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ModelError, match=r"config\.json"):
        read_geometry(tmp_path, "teacher.path")


@pytest.mark.parametrize("family", ["deepseek_v3", "qwen2", "qwen3", "llama"])
def test_parameters_equal_those_of_transformers_on_small_models(family, tmp_path):
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
    sizes |= {"intermediate_size": 80, "vocab_size": 101, "tie_word_embeddings": family == "qwen3", "head_dim": 12}
    if family == "deepseek_v3":
        sizes |= {"n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_shared_experts": 2}
        sizes |= {"first_k_dense_replace": 1, "q_lora_rank": 20, "kv_lora_rank": 12, "qk_rope_head_dim": 8}
        sizes |= {"qk_nope_head_dim": 10, "v_head_dim": 14, "n_group": 2, "topk_group": 1, "num_key_value_heads": 4}
    config = AutoConfig.for_model(family, **sizes)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    config.save_pretrained(tmp_path)
    biases = sum(b.numel() for name, b in model.named_buffers() if name.endswith("e_score_correction_bias"))
    counted = sum(p.numel() for p in model.parameters()) + biases
    assert parameters(read_geometry(tmp_path, "teacher.path")).total == counted


# --- Memory -----------------------------------------------------------------------------------------------------------

SMALL = {"max_seq_tokens": 4096, "micro_batch_tokens": 4096, "batch_tokens": 65536}
STATE = ("weights", "gradients", "optimizer")


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_weights_gradients_and_optimizer_take_16_bytes_a_parameter_and_zero_divides_them(dtype):
    count = parameters(QWEN_32B).total

    def state(stage: int, gpus: int) -> float:
        memory = train_memory(QWEN_32B, Train(zero_stage=stage, dtype=dtype, **SMALL), gpus)
        return sum(memory[name] for name in STATE)

    assert state(0, 8) == state(3, 1) == 16 * count
    weights, moments = (2, 12) if dtype == "bfloat16" else (4, 8)
    assert state(1, 8) == pytest.approx(count * (2 * weights + moments / 8))
    assert state(2, 8) == pytest.approx(count * (weights + (weights + moments) / 8))
    assert state(3, 8) == pytest.approx(count * 16 / 8)


def test_activations_of_one_token_counted_by_hand():
    g = dense("llama", 8, 3, 2, 1, 16, 10)
    outside, mlp = 2 * (4 * 8 + 2 * 8 + 2 * 4), 2 * 4 * 16

    def found(**train) -> float:
        return activation_bytes(g, 5, Train(**train))

    assert found() == 5 * 3 * (outside + mlp)
    assert found(mlp_tiles=4) == 5 * (3 * outside + mlp / 4)
    again = {"activation_checkpointing": True}
    assert found(**again) == 5 * (3 * 2 * (8 + 8) + outside + mlp)
    assert found(**again, mlp_tiles=4) == 5 * (3 * 2 * (8 + 8) + outside + mlp / 4)
    assert found(**again, activation_offload=True) == 5 * (2 * 2 * (8 + 8) + outside + mlp)
    products = 2 * (2 * 8 + 2 * 8 + 2 * 4 + 2 * 16)  # input and sum; queries and output; keys and values; gate and up
    assert found(**again, kept_activations="products") == 5 * (3 * products + outside + mlp)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_more_gpus_never_need_more_memory_per_gpu(stage, checkpointing):
    train = Train(zero_stage=stage, activation_checkpointing=checkpointing, **SMALL)
    needs = [sum(train_memory(QWEN_32B, train, 2**i).values()) for i in range(11)]
    assert needs == sorted(needs, reverse=True)
    assert (needs[0] > needs[-1]) == (stage > 0)


def test_each_measure_against_a_lack_of_memory_lowers_it():
    def need(**changes) -> float:
        return sum(train_memory(QWEN_32B, Train(**(SMALL | {"zero_stage": 2} | changes)), 8).values())

    assert need(zero_stage=3) < need() < need(zero_stage=1)
    assert need(activation_checkpointing=True) < need()
    assert need(offload="cpu") < need()
    assert need(max_seq_tokens=2048, micro_batch_tokens=2048) < need()


def bytes_a_weight(geometry: Geometry, adapter: Adapter | None = None, **changes) -> dict[str, float]:
    train = Train(zero_stage=0, dtype="bfloat16", **SMALL, **changes)
    memory = train_memory(geometry, train, 1, adapter)
    return {name: memory[name] / parameters(geometry).total for name in (*STATE, "average")}


def test_8_bit_moments_and_no_masters_leave_six_bytes_a_weight_by_hand():
    wide = 152_064 * 5120 / parameters(QWEN_32B).total  # the share of the embedding, whose moments keep 32 bits
    narrow = 2 * (1 + 4 / 256) * (1 - wide) + 8 * wide
    found = bytes_a_weight(QWEN_32B, optimizer="adamw8bit")
    assert [found[name] for name in STATE] == pytest.approx([2, 2, 4 + narrow])
    found = bytes_a_weight(QWEN_32B, optimizer="adamw8bit", master_weights="none", ema_decay=0.99)
    assert [*found.values()] == pytest.approx([2, 2, narrow, 4])
    assert bytes_a_weight(QWEN_32B, master_weights="none")["optimizer"] == pytest.approx(8)


def test_the_average_of_weights_lies_where_the_optimizers_state_does():
    found = [bytes_a_weight(QWEN_32B, offload=offload, ema_decay=0.99) for offload in ("none", "cpu", "nvme")]
    assert [each["average"] for each in found] == [4, 0, 0] and [each["optimizer"] > 0 for each in found] == [1, 0, 0]


def test_an_adapter_counted_by_hand_and_against_transformers():
    """Rank 3 on q_proj (8 to 8) and down_proj (16 to 8) of 3 layers: 3 * 3 * (16 + 24) = 360 weights of 16 bytes."""
    g = dense("llama", 8, 3, 2, 1, 16, 10)
    adapter = Adapter(kind="lora", rank=3, targets=["q_proj", "down_proj"])
    state = state_bytes(g, Train(**SMALL), adapter)
    assert trained_parameters(g, adapter) == 360
    assert state.weights == 2 * parameters(g).total + 2 * 360
    assert (state.gradients, state.optimizer, state.checkpoint) == (2 * 360, 12 * 360, 14 * 360)
    narrow = state_bytes(g, Train(**SMALL), Adapter(kind="qlora", rank=3, targets=["q_proj", "down_proj"]))
    projections = 3 * (8 * 8 + 2 * 8 * 4 + 8 * 8 + 3 * 8 * 16)
    spared = projections * (2 - 0.5 - 1 / 64 - 4 / 64 / 256)
    assert narrow.weights == pytest.approx(state.weights - spared)
    assert sum(state_bytes(QWEN_32B, Train(**SMALL), Adapter(kind="qlora")).__dict__.values()) < 25 * GB


def test_measured_training_memory_of_1_7b_is_within_a_fifth_of_the_arithmetic():
    # 13.6 GiB measured on one H100: bfloat16 weights, gradients and moments (8 bytes a parameter), 8192 tokens.
    train = Train(max_seq_tokens=8192, micro_batch_tokens=8192, activation_checkpointing=True)
    memory = train_memory(QWEN3_1_7B, train, 1)
    estimate = 8 * parameters(QWEN3_1_7B).total + memory["activations"]
    assert estimate == pytest.approx(13.6 * 2**30, rel=0.2)


@pytest.mark.parametrize(
    ("changes", "adapter", "measured_gib"),
    [
        ({"zero_stage": 0, "optimizer": "adamw8bit", "master_weights": "none"}, None, 56.1),
        ({"zero_stage": 1}, Adapter(kind="qlora", rank=16), 14.2),
    ],
)
def test_measured_training_memory_of_8b_is_within_a_fifth_of_the_plan(changes, adapter, measured_gib):
    """Peaks of whole steps on one H100, a row of 8192 tokens, recomputed activations, the loss on cached outcomes."""
    g = dense("qwen3", 4096, 36, 32, 8, 12288, 151_936, head_dim=128)
    train = Train(max_seq_tokens=8192, micro_batch_tokens=8192, activation_checkpointing=True, **changes)
    planned_gib = sum(train_memory(g, train, 1, adapter).values()) / 2**30
    assert measured_gib <= planned_gib < 1.2 * measured_gib


def test_r1_needs_50_gb_on_32_gpus_and_91_on_16_before_its_cache():
    def without_cache(kind: str, gpus: int, node_share: int) -> float:
        placement = place(R1, GPUS[kind], gpus, 8, LONG)
        assert placement.fits and placement.expert_parallel == gpus
        weights = parameters(R1).routed * 2 / gpus + 2 * (parameters(R1).total - parameters(R1).routed) / node_share
        return weights + placement.memory["workspace"]

    assert without_cache("h100", 32, 8) == pytest.approx(50 * GB, rel=0.01)
    assert without_cache("h200", 16, 8) == pytest.approx(91 * GB, rel=0.01)
    assert not place(R1, GPUS["h100"], 16, 8, LONG).fits
    assert not place(R1, GPUS["h200"], 8, 8, LONG).fits


def test_r1s_experts_stay_in_fp8_where_the_gpu_converts_it_and_then_16_h100_are_enough():
    r1 = R1.model_copy(update={"fp8_experts": True})
    assert teacher_element(r1, GPUS["h100"], "auto") == 1 and teacher_element(R1, GPUS["h100"], "auto") == 2
    assert teacher_element(r1, GPUS["a100"], "auto") == 2 and teacher_element(r1, GPUS["h100"], "float32") == 4
    whole, kept = (weight_bytes(r1, element, 1, 16) for element in (2, 1))
    assert kept["other weights"] == whole["other weights"]
    assert kept["experts"] == pytest.approx(whole["experts"] / 2 * (1 + 4 / 128**2))
    assert not place(r1, GPUS["h100"], 16, 8, LONG, 2).fits and place(r1, GPUS["h100"], 16, 8, LONG, 1).fits


@pytest.mark.parametrize("geometry", [R1, LITE, QWEN_32B])
@pytest.mark.parametrize("kind", sorted(GPUS))
@pytest.mark.parametrize("gpus", [1, 2, 4, 8, 16, 32, 48, 64, 128])
def test_a_placement_covers_all_gpus_in_copies_that_divide_the_model_evenly(geometry, gpus, kind):
    placement = place(geometry, GPUS[kind], gpus, 8, LONG)
    assert placement.copies * placement.size == gpus
    assert geometry.heads % placement.tensor_parallel == 0 and placement.tensor_parallel <= 8
    assert placement.size % placement.tensor_parallel == 0
    assert (geometry.routed_experts or 1) % placement.expert_parallel == 0
    if placement.fits:
        assert placement.memory_bytes <= GPUS[kind].memory_bytes


def test_a_model_fits_only_with_room_for_one_completion_of_full_length():
    weights = 2 * parameters(LITE).total + 5 * GB  # on one GPU, with the workspace
    tokens = int((80 * GB - weights) / cache_bytes_per_token(LITE)) - 200
    load = {"prompt_tokens": 200, "mean_new_tokens": 100, "batch_size": 1, "samples": 1}
    assert place(LITE, GPUS["h100"], 1, 8, Load(max_new_tokens=tokens, **load)).fits
    assert not place(LITE, GPUS["h100"], 1, 8, Load(max_new_tokens=tokens + 1, **load)).fits


def test_the_longest_row_fits_and_one_thousand_more_does_not():
    train = Train(zero_stage=3, sequence_parallel=2, activation_checkpointing=True)
    tokens = longest_row(QWEN3_4B, train, 2, GPUS["h100"])

    def needs(tokens: int) -> float:
        memory = train_memory(QWEN3_4B, train.model_copy(update={"micro_batch_tokens": tokens}), 2)
        return sum(memory.values())

    assert tokens % 1024 == 0 and needs(tokens) <= 80e9 < needs(tokens + 1024)
    assert longest_row(QWEN3_4B, train.model_copy(update={"zero_stage": 0}), 2, GPUS["l40s"]) == 0  # 4 x 16 bytes


# --- Time -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("geometry", "tokens_per_s", "mfu"), [(QWEN3_1_7B, 25_876, 0.344), (QWEN3_4B, 12_770, 0.405)])
def test_operations_of_training_give_the_measured_utilisation(geometry, tokens_per_s, mfu):
    assert tokens_per_s * train_flops(geometry, 8192) / 989e12 == pytest.approx(mfu, abs=0.004)


def test_training_time_by_hand():
    train = Train(max_seq_tokens=4096, micro_batch_tokens=4096, batch_tokens=16384, activation_checkpointing=True)
    one = train_seconds(QWEN3_1_7B, train, 1e6, 4096, 1, 8, GPUS["h100"])
    assert one == pytest.approx(1e6 * train_flops(QWEN3_1_7B, 4096) / (989e12 * 0.35))
    assert train_seconds(QWEN3_1_7B, train, 1e6, 4096, 4, 8, GPUS["h100"]) == pytest.approx(one / 4)
    assert train_seconds(QWEN3_1_7B, train, 1e6, 4096, 8, 8, GPUS["h100"]) == pytest.approx(
        one / 4
    )  # a batch of 4 rows
    kept = train.model_copy(update={"kept_activations": "products"})
    assert train_seconds(QWEN3_1_7B, kept, 1e6, 4096, 1, 8, GPUS["h100"]) == pytest.approx(one * 0.35 / 0.45)
    assert train_seconds(QWEN3_1_7B, train, 1e6, 4096, 4, 2, GPUS["h100"]) == pytest.approx(one / 4 / 0.85)


def test_few_samples_do_not_fill_the_gpus():
    few, many = (place(LITE, GPUS["h100"], 8, 8, Load(200, 500, 1000, 64, n)).tokens_per_s for n in (8, 100_000))
    assert few < many / 4


# --- The plan of a config ---------------------------------------------------------------------------------------------


def config_of(tmp_path, *overrides, **sections):
    base = {
        "run": {"name": "t"},
        "hardware": {"gpus": 64, "gpu": "h100", "price_per_device_hour": 2.5},
        "prompts": {
            "train": [{"kind": "hf", "path": "org/train", "limit": 1000}],
            "eval": [{"kind": "reasoning_gym", "families": {"gcd": 30, "products": 20}}],
        },
        "teacher": {
            "path": "org/r1", "geometry": R1.model_dump(), "sampling": {"n": 4, "max_new_tokens": 1000},
            "tensor_parallel": "auto", "expert_parallel": "auto",
        },
        "students": [{"name": "s", "path": "org/b", "loss": {"kind": "response"}, "geometry": QWEN_32B.model_dump()}],
        "train": {"zero_stage": 3, "activation_checkpointing": True, "batch_tokens": 262144},
        "eval": {"k": 4, "max_new_tokens": 1000},
    }  # fmt: skip
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(base | sections))
    return load_config(path, overrides)


def rows_of(result) -> dict:
    return {(row.stage, row.model): row for row in result.rows}


def test_tokens_and_cost_by_hand(tmp_path):
    result = plan(config_of(tmp_path))
    rows = rows_of(result)
    assert list(rows) == [("traces", "teacher"), ("train", "s"), ("eval", "teacher"), ("eval", "base b"), ("eval", "s")]
    assert rows["traces", "teacher"].tokens == 4000 * (200 + 250)
    assert rows["train", "s"].tokens == 4000 * (200 + 250) * 2
    assert rows["eval", "s"].tokens == 50 * 4 * (200 + 250) + 50 * (200 + 250)
    for row in result.rows:
        assert row.gpu_hours == row.hours * 64 and row.cost == row.hours * 64 * 2.5
    assert result.hours == sum(row.hours for row in result.rows)
    assert result.cost == pytest.approx(result.hours * 64 * 2.5)
    assert result.disk["3-logits"] == 4000 * 250 * (12 + 2.5 * 64)
    assert rows["train", "s"].flops == pytest.approx(rows["train", "s"].tokens * train_flops(QWEN_32B, 450))


def test_kept_traces_are_capped_and_stages_follow_the_settings(tmp_path):
    rows = rows_of(plan(config_of(tmp_path, "traces.max_per_prompt=1", "prompts.max_train=100", "train.epochs=3")))
    assert rows["train", "s"].tokens == 100 * 1 * 450 * 3
    assert rows["traces", "teacher"].tokens == 100 * 4 * 450
    assert rows_of(plan(config_of(tmp_path, "traces.max_per_prompt=9")))["train", "s"].tokens == 4000 * 450 * 2
    no_capture = plan(config_of(tmp_path, "teacher.capture=null", "publish.student=null"))
    assert set(no_capture.disk) == {"2-traces", "4-student"}


def test_the_disk_has_room_for_the_checkpoint_that_is_written_beside_those_that_are_kept(tmp_path):
    count = parameters(QWEN_32B).total
    for changes, kept in (["train.keep_checkpoints=2"], 3), (["train.keep_checkpoints=1", "train.keep_best=true"], 3):
        disk = plan(config_of(tmp_path, "train.dtype=bfloat16", *changes)).disk
        # Weights in 2 bytes, masters and two moments in 4 each; the tokens of the traces once more.
        assert disk["4-student"] == kept * 14 * count + 2 * count + disk["2-traces"]


def test_a_student_that_does_not_fit_is_named_with_what_to_change_and_the_advice_is_true(tmp_path):
    changes = ("train.zero_stage=2", "hardware.gpus=8", "hardware.gpu=h200")
    config = config_of(tmp_path, *changes, "train.batch_tokens=4194304", "teacher.url=http://localhost:1")
    result = plan(config, gpus=8, gpu="h100")
    assert not result.fits and len(result.problems) == 1
    said = result.problems[0]
    need = sum(train_memory(QWEN_32B, config.train, 8).values())
    assert f"s: training needs {need / GB:.0f} GB per GPU with ZeRO-2 on 8 x h100, which has 80. Use " in said
    for way in said.split(". Use ")[1].rstrip(".").split(" or "):
        if way.startswith("train."):
            changed = config_of(tmp_path, *changes, "teacher.url=http://localhost:1", *way.split(" and "))
            assert plan(changed, gpus=8, gpu="h100").fits, way
        elif way.endswith(" GPUs"):
            assert plan(config, gpus=int(way.split()[0]), gpu="h100").fits, way
            assert not plan(config, gpus=int(way.split()[0]) // 2, gpu="h100").fits, way
        else:
            count, kind = way.split(" x ")
            assert plan(config, gpus=int(count), gpu=kind).fits, way


def test_a_teacher_that_does_not_fit_is_named_once_with_the_fewest_gpus(tmp_path):
    result = plan(config_of(tmp_path), gpus=8)
    teacher = [p for p in result.problems if p.startswith("teacher:")]
    assert len(teacher) == 1 and "Use 32 x h100 or 8 x b200." in teacher[0]
    assert plan(config_of(tmp_path), gpus=32).rows[0].fits and not plan(config_of(tmp_path), gpus=16).rows[0].fits
    assert result.hours is None and result.cost is None and not result.fits
    assert rows_of(result)["traces", "teacher"].hours is None


def test_text_and_json_say_the_same(tmp_path):
    result = plan(config_of(tmp_path))
    text, data = result.render(), json.loads(result.to_json())
    assert data["fits"] is True and data["gpus"] == 64 and data["hours"] == pytest.approx(result.hours)
    assert [row["model"] for row in data["rows"]] == [row.model for row in result.rows]
    for row in data["rows"]:
        assert row["memory_bytes"] == pytest.approx(sum(row["memory"].values()))
        assert row["model"] in text
    assert "671.03B" in text and "32.76B" in text and text.endswith("Everything fits.")
    assert max(map(len, text.splitlines())) < 200
    assert "Does not fit" in plan(config_of(tmp_path), gpus=8).render()


def test_what_the_plan_cannot_know_is_an_error_and_not_a_guess(tmp_path):
    with pytest.raises(ConfigError, match=r"prompts\.train\.0\.limit is null"):
        plan(config_of(tmp_path, "prompts.train.0.limit=null"))
    with pytest.raises(ModelError, match=r"students\.0\.path is org/b, whose sizes are not known"):
        plan(config_of(tmp_path, "students.0.geometry=null"))
    with pytest.raises(ConfigError, match="--gpu is 'v100'"):
        plan(config_of(tmp_path), gpu="v100")
    with pytest.raises(ConfigError, match="--gpus is 12"):
        plan(config_of(tmp_path), gpus=12)


def test_a_jsonl_file_is_counted(tmp_path):
    (tmp_path / "p.jsonl").write_text('{"a": 1}\n\n{"a": 2}\n{"a": 3}')
    train = {"kind": "jsonl", "path": str(tmp_path / "p.jsonl")}
    config = config_of(tmp_path, f"prompts.train.0={json.dumps(train)}")
    assert plan(config).rows[0].tokens == 3 * 4 * 450


def test_general_data_is_a_share_of_all_tokens_and_makes_no_trace_longer(tmp_path):
    plain, mixed = (plan(config_of(tmp_path, *more)) for more in ([], ["train.general={share: 0.2}"]))
    before, after = (rows_of(result)["train", "s"] for result in (plain, mixed))
    assert after.tokens == pytest.approx(before.tokens / 0.8)
    assert after.flops / after.tokens == pytest.approx(before.flops / before.tokens)
    other = plan(config_of(tmp_path, "train.trace_sets=[{name: a, run: runs/a}]"))
    assert any("traces of other runs come on top" in note for note in other.notes)


def test_idle_gpus_and_a_remote_teacher_are_noted(tmp_path):
    result = plan(config_of(tmp_path, "train.batch_tokens=65536", "teacher.url=http://localhost:1"))
    assert any("feeds 16 GPUs with 4096 tokens each; 48 stand idle" in note for note in result.notes)
    assert any("http://localhost:1" in note for note in result.notes)
    assert all(row.model != "teacher" for row in result.rows)
