"""Tiny random models of many families of transformers."""

from typing import Any

import torch

V = 211


SIZES: dict[str, Any] = {
    "vocab_size": V,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Qwen3": {"head_dim": 8, "num_key_value_heads": 2},
    "Gemma2": {"head_dim": 8, "num_key_value_heads": 2, "final_logit_softcapping": 2.0},
    "Granite": {"logits_scaling": 3.0},
    "Cohere": {"logit_scale": 0.25},
    "Phi": {},
    "GPTNeoX": {},
}


def make_family(name: str) -> Any:
    """A tiny random model of a family, its weights large enough for scales and soft-caps to matter."""
    import transformers

    config = getattr(transformers, f"{name}Config")(**SIZES, **FAMILIES[name])
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        parameter.data.mul_(3.0)
    return model
