"""In which form weights, cache and activations are held, by the settings and the checkpoint."""

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

from evenhand_engine.model.config import load_model_config
from evenhand_engine.model.precision import resolve_activation_dtype, resolve_precision


@pytest.mark.parametrize(
    ("stored", "dtype", "quantization", "expected"),
    [
        ("bfloat16", "auto", "none", None),
        ("float16", "auto", "none", None),  # quantised checkpoints say so too
        ("float32", "auto", "none", torch.float32),
        ("float32", "auto", "int8", None),
        ("float32", "bfloat16", "none", None),
        ("bfloat16", "float32", "none", torch.float32),
    ],
)
def test_activations_lose_nothing_beside_weights_of_float32(
    tmp_path: Path, stored: str, dtype: str, quantization: str, expected: torch.dtype | None
) -> None:
    """None: what suits the processor."""
    LlamaConfig(dtype=stored, architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path)
    config, precision = load_model_config(tmp_path), resolve_precision(dtype, quantization)
    assert resolve_activation_dtype("auto", precision, config) is expected
    assert resolve_activation_dtype("int8", precision, config) is torch.int8
