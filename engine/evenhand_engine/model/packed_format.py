"""PackedFormat: how a checkpoint of AWQ or GPTQ packs its integers, read from its config. Needs no torch."""

from dataclasses import dataclass
from typing import Any

from evenhand_engine.errors import StartupError

METHODS = ("awq", "gptq")
BITS = {"awq": (4,), "gptq": (4, 8)}


@dataclass(frozen=True, slots=True)
class PackedFormat:
    """`quantization_config` of a checkpoint. `zero_offset`: what is missing from its stored zeros."""

    method: str
    bits: int
    zero_offset: int


def parse_packed_format(document: dict[str, Any], origin: str) -> PackedFormat:
    """Raises StartupError for what the kernels would compute wrongly."""
    method, bits = document.get("quant_method", "unknown"), document.get("bits", document.get("w_bit"))
    if method not in METHODS:
        raise StartupError(
            f"{origin}: weights quantised by {method} are not supported; use awq, gptq, a float or a GGUF checkpoint"
        )
    if bits not in BITS[method]:
        supported = " or ".join(map(str, BITS[method]))
        raise StartupError(f"{origin}: {method} weights of {bits} bits are not supported; supported are {supported}")
    if method == "awq" and document.get("version", "gemm").lower() != "gemm":
        raise StartupError(f"{origin}: awq version {document['version']} is not supported; supported is gemm")
    version_1 = method == "gptq" and document.get("checkpoint_format", "gptq") != "gptq_v2"
    return PackedFormat(method, bits, int(version_1))
