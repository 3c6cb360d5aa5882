"""How a checkpoint holds its quantised projections, read from its config. Needs no torch.

PackedFormat: integers of AWQ and GPTQ. Fp8Format: floats of 8 bits, as vLLM, DeepSeek, FBGEMM and compressed-tensors store them.
"""

from dataclasses import dataclass
from typing import Any

from evenhand_engine.errors import StartupError

METHODS = ("awq", "gptq")
FP8_METHODS = ("fp8", "fbgemm_fp8", "compressed-tensors")
BITS = {"awq": (4,), "gptq": (4, 8)}


@dataclass(frozen=True, slots=True)
class PackedFormat:
    """`quantization_config` of a checkpoint. `zero_offset`: what is missing from its stored zeros."""

    method: str
    bits: int
    zero_offset: int


@dataclass(frozen=True, slots=True)
class Fp8Format:
    """`block`: outputs and inputs that share a scale; None: all, or those of one output."""

    block: tuple[int, int] | None


QuantizedFormat = PackedFormat | Fp8Format


def parse_quantized_format(document: dict[str, Any], origin: str) -> QuantizedFormat:
    """`quantization_config`. Raises StartupError for what the kernels would compute wrongly."""
    method, bits = document.get("quant_method", "unknown"), document.get("bits", document.get("w_bit"))
    if method in FP8_METHODS:
        return _fp8_format(document, method, origin)
    if method not in METHODS:
        raise StartupError(
            f"{origin}: weights quantised by {method} are not supported; use awq, gptq, fp8, a float or a GGUF checkpoint"
        )
    if bits not in BITS[method]:
        supported = " or ".join(map(str, BITS[method]))
        raise StartupError(f"{origin}: {method} weights of {bits} bits are not supported; supported are {supported}")
    if method == "awq" and document.get("version", "gemm").lower() != "gemm":
        raise StartupError(f"{origin}: awq version {document['version']} is not supported; supported is gemm")
    version_1 = method == "gptq" and document.get("checkpoint_format", "gptq") != "gptq_v2"
    return PackedFormat(method, bits, int(version_1))


def _fp8_format(document: dict[str, Any], method: str, origin: str) -> Fp8Format:
    form, block = document.get("fmt", "e4m3"), document.get("weight_block_size")
    if method == "compressed-tensors":
        groups = document.get("config_groups")
        weights = [group.get("weights") or {} for group in groups.values()] if isinstance(groups, dict) else []
        if not weights or any((one.get("type"), one.get("num_bits")) != ("float", 8) for one in weights):
            raise StartupError(f"{origin}: compressed-tensors of other weights than floats of 8 bits are not supported")
        blocks = [one.get("block_structure") for one in weights]
        if any(one != blocks[0] for one in blocks):
            raise StartupError(f"{origin}: compressed-tensors with several sizes of blocks are not supported")
        block = blocks[0]
    if form != "e4m3":
        raise StartupError(f"{origin}: fp8 weights of format {form} are not supported; supported is e4m3")
    if block is None:
        return Fp8Format(None)
    if not (isinstance(block, list) and len(block) == 2 and all(isinstance(size, int) and size > 0 for size in block)):
        raise StartupError(f"{origin}: fp8 blocks must be two sizes, outputs and inputs, and are {block}")
    return Fp8Format((block[0], block[1]))
