"""The four bundled models: geometry, tokenizer, training text and schedule of each. Change one and retrain."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Recipe:
    """What `python -m teachers.tiny.train NAME` builds."""

    folder: str  # beside this file
    tokenizer: str  # teachers/tiny/tokenizers.py
    style: str  # corpus.py: "worked" solutions or "direct" answers
    architecture: str
    geometry: dict
    docs: int
    steps: int
    batch_tokens: int = 131_072
    lr: float = 2e-3
    warmup_steps: int = 200
    weight_decay: float = 0.1
    bias_update: float = 1e-3  # DeepSeek-V3's auxiliary-loss-free balancing: step of the router's correction bias


_STUDENT = {
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 48,
    "tie_word_embeddings": True,
    "max_position_embeddings": 2048,
}

RECIPES = {
    "teacher": Recipe(
        folder="teacher",
        tokenizer="teacher",
        style="worked",
        architecture="deepseek_v3",
        geometry={
            "hidden_size": 256,
            "intermediate_size": 768,
            "moe_intermediate_size": 128,
            "num_hidden_layers": 6,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "n_shared_experts": 1,
            "n_routed_experts": 16,
            "num_experts_per_tok": 4,
            "n_group": 4,
            "topk_group": 2,
            "routed_scaling_factor": 1.0,
            "q_lora_rank": 96,
            "kv_lora_rank": 64,
            "qk_rope_head_dim": 16,
            "qk_nope_head_dim": 32,
            "v_head_dim": 32,
            "first_k_dense_replace": 1,
            "num_nextn_predict_layers": 0,
            "max_position_embeddings": 2048,
        },
        docs=1_000_000,
        steps=14_000,
        batch_tokens=32_768,
        lr=1.5e-3,
    ),
    "student-same": Recipe(
        "student-same", "teacher", "direct", "qwen3", _STUDENT, docs=300_000, steps=6500, batch_tokens=16_384, lr=2e-3
    ),
    "student-qwen": Recipe(
        "student-qwen", "qwen", "direct", "qwen3", _STUDENT, docs=300_000, steps=6500, batch_tokens=16_384, lr=2e-3
    ),
    "student-llama": Recipe(
        "student-llama", "llama", "direct", "llama", _STUDENT, docs=300_000, steps=6500, batch_tokens=16_384, lr=2e-3
    ),
}
