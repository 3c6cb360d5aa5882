"""AWQ and GPTQ checkpoints, packed here as AutoAWQ and AutoGPTQ pack them, compute what their integers say."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, PreTrainedModel

from evenhand_engine.errors import StartupError
from evenhand_kernels.kernels import Kernels

GROUP = 32
AWQ_PACKING = (0, 2, 4, 6, 1, 3, 5, 7)
"""AutoAWQ: which of eight columns goes into each place of a word, from the lowest bits on."""


def packed(columns: Tensor, bits: int, order: tuple[int, ...] | None = None) -> Tensor:
    """[rows, columns / codes of a word], int32, of codes [rows, columns]."""
    per_word = 32 // bits
    codes = columns.long().view(len(columns), -1, per_word)
    if order is not None:
        codes = codes[..., order]
    words = (codes << torch.arange(0, 32, bits)).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).int()


def quantize(weight: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes [inputs, outputs], zeros and float16 scales [groups, outputs] near the weight, [outputs, inputs]."""
    grouped = weight.T.reshape(-1, GROUP, len(weight))
    low, high = grouped.amin(1).clamp_max(0), grouped.amax(1).clamp_min(0)
    scales = ((high - low) / (2**bits - 1)).half()
    zeros = (-low / scales.float()).round().clamp(1, 2**bits - 1)
    codes = (grouped / scales.float()[:, None] + zeros[:, None]).round().clamp(0, 2**bits - 1)
    return codes.flatten(0, 1), zeros, scales


def rewrite(model_dir: Path, reference: PreTrainedModel, method: str, bits: int, checkpoint_format: str) -> None:
    """Quantise the checkpoint's projections, and round the reference's own to the same values."""
    tensors = load_file(model_dir / "model.safetensors")
    parameters = dict(reference.named_parameters())
    for name in [name for name in tensors if "_proj.weight" in name]:
        prefix, weight = name.removesuffix(".weight"), tensors.pop(name)
        codes, zeros, scales = quantize(weight, bits)
        spread = scales.float().repeat_interleave(GROUP, 0), zeros.repeat_interleave(GROUP, 0)
        parameters[name].data = ((codes - spread[1]) * spread[0]).T.contiguous()
        if method == "awq":
            parts = {"qweight": packed(codes, 4, AWQ_PACKING), "qzeros": packed(zeros, 4, AWQ_PACKING)}
        else:
            stored = zeros - int(checkpoint_format == "gptq")
            parts = {"qweight": packed(codes.T, bits).T.contiguous(), "qzeros": packed(stored, bits)}
            parts["g_idx"] = (torch.arange(len(codes)) // GROUP).int()
        tensors |= {f"{prefix}.{part}": tensor for part, tensor in (parts | {"scales": scales}).items()}
    save_file(tensors, model_dir / "model.safetensors")
    document = json.loads((model_dir / "config.json").read_text())
    document["quantization_config"] = {"quant_method": method, "bits": bits, "group_size": GROUP}
    document["quantization_config"]["checkpoint_format"] = checkpoint_format
    (model_dir / "config.json").write_text(json.dumps(document))


@pytest.mark.parametrize(
    "method, bits, checkpoint_format",
    [("awq", 4, ""), ("gptq", 4, "gptq"), ("gptq", 8, "gptq"), ("gptq", 4, "gptq_v2")],
)
def test_a_checkpoint_computes_what_its_integers_say(
    checkpoint: Callable[..., tuple[Path, PreTrainedModel]],
    our_logits: Callable[..., Tensor],
    kernels: Kernels,
    method: str,
    bits: int,
    checkpoint_format: str,
) -> None:
    model_dir, reference = checkpoint(LlamaConfig, intermediate_size=160)
    rewrite(model_dir, reference, method, bits, checkpoint_format)
    with torch.inference_mode():
        expected = reference(torch.tensor([list(range(40))])).logits[0]

    actual = our_logits(model_dir, range(40), (30, 9, 1), kernels)

    assert (actual - expected).abs().max() < 4e-4 * expected.std(), "float32 rounding explains about 1e-4"


def test_groups_in_another_order_are_refused(
    checkpoint: Callable[..., tuple[Path, PreTrainedModel]], our_logits: Callable[..., Tensor], kernels: Kernels
) -> None:
    model_dir, reference = checkpoint(LlamaConfig, intermediate_size=160)
    rewrite(model_dir, reference, "gptq", 4, "gptq")
    tensors = load_file(model_dir / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.g_idx"] = tensors["model.layers.1.mlp.up_proj.g_idx"].flip(0).contiguous()
    save_file(tensors, model_dir / "model.safetensors")
    with pytest.raises(StartupError, match=r"model\.layers\.1\.mlp\.up_proj\.g_idx: .*desc_act"):
        our_logits(model_dir, range(4), (4,), kernels)
