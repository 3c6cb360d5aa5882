"""fp8 checkpoints, as they come from Hugging Face, compute what their floats and scales say."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, PreTrainedModel

from evenhand_engine.errors import StartupError
from evenhand_engine.model.fp8_weights import read_fp8
from evenhand_engine.model.packed_format import Fp8Format, parse_quantized_format
from evenhand_engine.model.sharding import Shard, ShardedSource
from evenhand_kernels.kernels import Kernels
from evenhand_kernels.quantized import QuantizedTensor, Weight

BLOCK = (32, 64)


def compressed(**weights: Any) -> dict[str, Any]:
    return {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": weights}}}


FORMS: dict[str, tuple[dict[str, Any], str, tuple[int | None, int | None]]] = {
    "per tensor": ({"quant_method": "fp8", "activation_scheme": "static"}, "weight_scale", (None, None)),
    "per block": ({"quant_method": "fp8", "weight_block_size": list(BLOCK)}, "weight_scale_inv", BLOCK),
    "per channel": (compressed(num_bits=8, type="float", strategy="channel"), "weight_scale", (1, None)),
    "fbgemm": ({"quant_method": "fbgemm_fp8"}, "weight_scale", (1, None)),
}


def quantize(weight: Tensor, block: tuple[int | None, int | None]) -> tuple[Tensor, Tensor, Tensor]:
    """Codes near the weight, scales that are powers of two, and what these say; None: a block is all of that axis."""
    high, wide = block[0] or len(weight), block[1] or weight.shape[1]
    rows, columns = -(-len(weight) // high), -(-weight.shape[1] // wide)
    scales = torch.empty(rows, columns)
    spread = torch.empty_like(weight)
    for row in range(rows):
        for column in range(columns):
            part = (slice(row * high, (row + 1) * high), slice(column * wide, (column + 1) * wide))
            scales[row, column] = 2.0 ** math.ceil(math.log2(weight[part].abs().max().item() / 448))
            spread[part] = scales[row, column]
    codes = (weight / spread).to(torch.float8_e4m3fn)
    return codes, scales, codes.float() * spread


def rewrite(model_dir: Path, reference: PreTrainedModel, form: str) -> None:
    """Quantise the checkpoint's projections, and round the reference's own to the same values."""
    document, name_of_scale, block = FORMS[form]
    tensors = load_file(model_dir / "model.safetensors")
    parameters = dict(reference.named_parameters())
    for name in [name for name in tensors if "_proj.weight" in name]:
        codes, scales, parameters[name].data = quantize(tensors[name], block)
        tensors[name] = codes
        tensors[name.replace("weight", name_of_scale)] = scales.squeeze() if block == (None, None) else scales
        if document.get("activation_scheme") == "static":
            tensors[name.replace("weight", "input_scale")] = torch.tensor(0.01)
    save_file(tensors, model_dir / "model.safetensors")
    config = json.loads((model_dir / "config.json").read_text())
    (model_dir / "config.json").write_text(json.dumps(config | {"quantization_config": document}))


@pytest.mark.parametrize("form", FORMS)
def test_a_checkpoint_computes_what_its_floats_say(
    checkpoint: Callable[..., tuple[Path, PreTrainedModel]],
    our_logits: Callable[..., Tensor],
    kernels: Kernels,
    form: str,
) -> None:
    model_dir, reference = checkpoint(LlamaConfig, intermediate_size=160)  # the last block of inputs is cut off
    rewrite(model_dir, reference, form)
    with torch.inference_mode():
        expected = reference(torch.tensor([list(range(40))])).logits[0]

    actual = our_logits(model_dir, range(40), (30, 9, 1), kernels)

    assert (actual - expected).abs().max() < 4e-4 * expected.std(), "float32 rounding explains about 1e-4"


@pytest.mark.parametrize(
    "document, message",
    [
        ({"quant_method": "fp8", "fmt": "e5m2"}, "fp8 weights of format e5m2 are not supported; supported is e4m3"),
        ({"quant_method": "fp8", "weight_block_size": [128]}, r"fp8 blocks must be two sizes, .* and are \[128\]"),
        ({"quant_method": "fp8", "weight_block_size": [0, 8]}, "fp8 blocks must be two sizes"),
        (compressed(num_bits=4, type="int"), "compressed-tensors of other weights than floats of 8 bits"),
        ({"quant_method": "compressed-tensors"}, "compressed-tensors of other weights than floats of 8 bits"),
        (
            {
                "quant_method": "compressed-tensors",
                "config_groups": {
                    name: {"weights": {"num_bits": 8, "type": "float", "block_structure": [size, size]}}
                    for name, size in (("a", 64), ("b", 128))
                },
            },
            "compressed-tensors with several sizes of blocks",
        ),
        ({"quant_method": "bitsandbytes"}, "weights quantised by bitsandbytes are not supported; use awq, gptq, fp8"),
    ],
)
def test_what_the_kernels_would_compute_wrongly_is_refused(document: dict[str, Any], message: str) -> None:
    with pytest.raises(StartupError, match=message):
        parse_quantized_format(document, "config.json")


@pytest.mark.parametrize(
    "codes, scales, block, message",
    [
        (torch.zeros(8, 64), torch.ones(1), None, "tensor p.weight is no matrix of float8_e4m3fn"),
        (torch.zeros(8, 64).to(torch.float8_e4m3fn), torch.ones(3), None, "neither one number nor one for each output"),
        (torch.zeros(8, 64).to(torch.float8_e4m3fn), torch.ones(2, 3), (4, 32), "no block of 4 x 32 each"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(
    codes: Tensor, scales: Tensor, block: tuple[int, int] | None, message: str
) -> None:
    tensors = {"p.weight": codes, "p.weight_scale": scales}
    with pytest.raises(StartupError, match=message):
        read_fp8(tensors.__getitem__, tensors.__contains__, "p", Fp8Format(block))


def test_a_part_of_the_inputs_keeps_the_scales_of_its_outputs() -> None:
    codes = torch.arange(128.0).view(2, 64).to(torch.float8_e4m3fn)
    whole = QuantizedTensor(codes, torch.tensor([[1.0], [2.0]]))

    class Source:
        def take(self, name: str, *shape: int) -> Weight:
            return whole

        def take_scale(self, name: str) -> None: ...

    part = ShardedSource(Source(), Shard(1, 2)).take("o_proj.weight", 2, 32)
    assert isinstance(part, QuantizedTensor) and part.dequantized().equal(whole.dequantized()[:, 32:])
