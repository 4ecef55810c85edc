"""The configuration of a tiny random model of every supported family."""

from __future__ import annotations

from typing import Any

import torch

from layer_surgery.checkpoint.architectures import ARCHITECTURES

VOCABULARY = 61
#: Every token sees all others; see tiny_encoders.py. All other architectures predict the next token.
ENCODERS = ("bert", "deberta-v2", "distilbert", "electra", "modernbert", "mpnet", "roberta", "xlm-roberta")
DECODERS = sorted(ARCHITECTURES.keys() - {*ENCODERS})

SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

WINDOW = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 3}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
LINEAR_ATTENTION = {
    "head_dim": 16,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}

#: Fields beside the sizes, by model_type: head_dim is not hidden / heads where a family lets it differ, windows are
#: shorter than the sequences of the tests, multipliers are not 1, and biases are there where a family has them.
FIELDS: dict[str, dict[str, Any]] = {
    "llama": {"head_dim": 12},
    "mistral": {"head_dim": 12, "sliding_window": 5},
    "qwen2": WINDOW,
    "qwen3": {"head_dim": 12} | WINDOW,
    "gemma": {"head_dim": 12},
    "gemma2": {"head_dim": 12, "query_pre_attn_scalar": 12, "sliding_window": 5},
    "gemma3_text": {"head_dim": 12, "query_pre_attn_scalar": 12, "sliding_window": 5},
    "olmo3": {"sliding_window": 5},
    "granite": {
        **{"embedding_multiplier": 1.7, "logits_scaling": 1.3},
        **{"residual_multiplier": 0.6, "attention_multiplier": 0.4},
    },
    "stablelm": {"use_qkv_bias": True},
    "cohere": {"use_qk_norm": True},
    "starcoder2": {"sliding_window": 5},
    "phi3": {"sliding_window": 5, "original_max_position_embeddings": 64},
    "glm4": {"head_dim": 12, "attention_bias": True},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 12, "sliding_window": 5},
    "qwen2_moe": {"shared_expert_intermediate_size": 20, "decoder_sparse_step": 2} | EXPERTS | WINDOW,
    "qwen3_moe": {"head_dim": 12, "mlp_only_layers": [1]} | EXPERTS,
    "smollm3": {"use_sliding_window": False, "no_rope_layer_interval": 4},
    "deepseek_v3": {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 12,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 2,
        "q_lora_rank": 10,
        "kv_lora_rank": 8,
        "qk_nope_head_dim": 6,
        "qk_rope_head_dim": 4,
        "v_head_dim": 10,
        "num_nextn_predict_layers": 1,
        "n_shared_experts": 1,
    },
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 12, "sliding_window": 5},
    "gemma4_text": {
        "head_dim": 12,
        "global_head_dim": 8,
        "hidden_size_per_layer_input": 0,
        "num_kv_shared_layers": 0,
        "sliding_window": 5,
        "vocab_size_per_layer_input": 61,
    },
    "gpt2": {"n_inner": 40},
    "gptj": {"n_inner": 40, "rotary_dim": 4},
    "gpt_neo": {"attention_types": [[["global", "local"], 3]], "window_size": 5},
    "opt": {"ffn_dim": 40, "word_embed_proj_dim": 24},
    "mpt": {"max_seq_len": 64},
    "qwen3_next": {
        "mlp_only_layers": [1],
        "initializer_range": 0.1,  # with 0.2 the recurrence amplifies rounding a thousandfold
        "shared_expert_intermediate_size": 20,
    }
    | EXPERTS
    | LINEAR_ATTENTION,
    "qwen3_5_text": LINEAR_ATTENTION,
    "lfm2": {
        "layer_types": ["conv", "conv", "full_attention"] * 2,
        "block_auto_adjust_ff_dim": False,
    },
    "granitemoehybrid": {
        "layer_types": ["linear_attention", "linear_attention", "full_attention"] * 2,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "mamba_n_heads": 8,
        "mamba_d_state": 8,
        "mamba_chunk_size": 8,
        "shared_intermediate_size": 20,
    },
}

#: Number of layers where it is not 5: every kind of layer occurs, and without layers 0 and 3 the pattern is broken.
LAYERS = {
    **dict.fromkeys(("gemma2", "gpt_neo", "gpt_oss", "granitemoehybrid", "lfm2", "qwen2", "qwen2_moe", "qwen3"), 6),
    **dict.fromkeys(("gemma4_text", "olmo3", "qwen3_5_text", "qwen3_next", "smollm3"), 8),
    "gemma3_text": 7,
}
#: With layers of several kinds, of which the tiny configurations have six.
SIX_LAYERS = ("gpt_neo", "lfm2", "granitemoehybrid", "qwen3_next", "qwen3_5_text", "gemma4_text")
#: transformers' kernel for mixtures of experts has no float64.
FLOAT32_ONLY = ("deepseek_v3", "gpt_oss", "granitemoehybrid", "mixtral", "qwen2_moe", "qwen3_moe", "qwen3_next")
#: Families that compute attention or a mask in float32, also in a float64 model.
FLOAT32_INSIDE = ("gemma4_text", "gpt_neo", "gptj")


def dtype_of(model_type: str) -> torch.dtype:
    return torch.float32 if model_type in FLOAT32_ONLY else torch.float64
