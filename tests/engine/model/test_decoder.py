"""Every supported architecture and feature computes the logits that transformers computes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

from evenhand_kernels.kernels import Kernels

YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "original_max_position_embeddings": 64,
    "short_factor": [1.0] * 16,
    "long_factor": [1.0 + 0.5 * i for i in range(16)],
}
MODELS: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    "llama": (LlamaConfig, {}),
    "llama-tied": (LlamaConfig, {"tie_word_embeddings": True}),
    "llama-biases": (LlamaConfig, {"attention_bias": True, "mlp_bias": True}),
    "llama-no-groups": (LlamaConfig, {"num_key_value_heads": 6}),
    "llama-head-dim-40": (LlamaConfig, {"head_dim": 40}),
    "llama-linear": (LlamaConfig, {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.5}}),
    "llama-dynamic": (LlamaConfig, {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}),
    "llama-llama3": (LlamaConfig, {"rope_parameters": LLAMA3}),
    "llama-yarn": (LlamaConfig, {"rope_parameters": YARN}),
    "llama-yarn-mscale": (LlamaConfig, {"rope_parameters": YARN | {"mscale": 0.7, "mscale_all_dim": 1.3}}),
    "llama-longrope": (LlamaConfig, {"rope_parameters": LONGROPE}),
    "mistral": (MistralConfig, {"sliding_window": None}),
    "mistral-window": (MistralConfig, {"sliding_window": 23}),
    "qwen2": (Qwen2Config, {}),
    "qwen2-window": (Qwen2Config, {"use_sliding_window": True, "sliding_window": 19, "max_window_layers": 1}),
    "qwen3": (Qwen3Config, {}),
    "qwen3-biases": (Qwen3Config, {"attention_bias": True}),
    "qwen3-layer-types": (
        Qwen3Config,
        {
            "use_sliding_window": True,
            "sliding_window": 16,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "smollm3": (SmolLM3Config, {"no_rope_layers": [1, 0, 1], "pad_token_id": 0}),
    "smollm3-interval": (SmolLM3Config, {"no_rope_layer_interval": 2, "pad_token_id": 0}),
}


@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_those_of_transformers(
    name: str,
    kernels: Kernels,
    checkpoint: Callable[..., tuple[Path, PreTrainedModel]],
    our_logits: Callable[..., Tensor],
) -> None:
    config_class, fields = MODELS[name]
    model_dir, reference = checkpoint(config_class, **fields)
    token_ids = torch.randint(0, 199, (150,), generator=torch.Generator().manual_seed(1)).tolist()
    with torch.inference_mode():
        expected = reference(torch.tensor([token_ids])).logits[0]

    actual = our_logits(model_dir, token_ids, (1, 15, 17, 70, 1, 1, 45), kernels)

    assert torch.isfinite(actual).all()
    scale = expected.std()
    assert (actual - expected).abs().max() < 2e-4 * scale, "float32 rounding explains about 1e-5"
    assert expected.argmax(-1).equal(actual.argmax(-1))
