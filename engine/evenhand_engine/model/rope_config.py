"""RopeConfig: the rotary position embedding of a checkpoint, from whichever spelling its `config.json` has."""

from dataclasses import dataclass
from typing import Any

import msgspec

from evenhand_engine.errors import StartupError
from evenhand_engine.model.config_json import ConfigJson, listed

SUPPORTED_ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "llama3", "longrope")
_SCALING_PARAMETERS = {"factor", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow", "long_factor"}


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary position embedding: which frequencies, as `transformers.modeling_rope_utils` defines them.

    `factor` scales positions; `attention_factor` multiplies cosines and sines (None: the type's own rule);
    `original_max_position_embeddings` is the context that the model was first trained with.
    """

    rope_type: str
    theta: float
    factor: float = 1.0
    original_max_position_embeddings: int = 0
    attention_factor: float | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()


def parse_rope(fields: ConfigJson, default_theta: float, origin: str) -> RopeConfig:
    """Both spellings: `rope_parameters` of today, `rope_theta` with `rope_scaling` of before."""
    parameters = _rope_parameters(fields, origin)
    rope_type = parameters.get("rope_type") or parameters.get("type") or "default"
    if rope_type == "default" and (unused := parameters.keys() & _SCALING_PARAMETERS):
        raise StartupError(
            f"{origin}: rope parameters have {listed(sorted(unused))} but no rope_type: say which, one of "
            f"{listed(SUPPORTED_ROPE_TYPES)}"
        )
    if rope_type not in SUPPORTED_ROPE_TYPES:
        raise StartupError(
            f"{origin}: rope type {rope_type} is not supported; supported are {listed(SUPPORTED_ROPE_TYPES)}"
        )
    if parameters.get("partial_rotary_factor", fields.partial_rotary_factor) != 1.0:
        raise StartupError(f"{origin}: partial_rotary_factor other than 1 is not supported")
    original = (
        parameters.get("original_max_position_embeddings")
        or fields.original_max_position_embeddings
        or fields.max_position_embeddings
    )
    resolved = {
        "rope_type": rope_type,
        "theta": parameters.get("rope_theta") or fields.rope_theta or default_theta,
        "factor": parameters.get("factor") or fields.max_position_embeddings / original,
        "original_max_position_embeddings": original,
    }
    known = {name: value for name, value in parameters.items() if name in RopeConfig.__slots__ and value is not None}
    try:
        return msgspec.convert(known | resolved, RopeConfig, strict=False)
    except msgspec.ValidationError as error:
        raise StartupError(f"{origin}: rope parameters: {error}") from error


def _rope_parameters(fields: ConfigJson, origin: str) -> dict[str, Any]:
    """Those of all layers. They may be written by type of layer, if they are the same for each type."""
    parameters = fields.rope_parameters or fields.rope_scaling or {}
    by_layer_type = [value for value in parameters.values() if isinstance(value, dict)]
    if not by_layer_type:
        return parameters
    if len(by_layer_type) < len(parameters) or any(each != by_layer_type[0] for each in by_layer_type):
        raise StartupError(
            f"{origin}: rope parameters that differ between {listed(sorted(parameters))} layers are not supported"
        )
    return dict(by_layer_type[0])


def context_length(fields: ConfigJson, rope: RopeConfig) -> int:
    """Longest context: scaling by `linear` and `yarn` lengthens the context; the other types' configs hold the longer one already."""
    match rope.rope_type:
        case "linear":
            return int(fields.max_position_embeddings * rope.factor)
        case "yarn":
            return max(fields.max_position_embeddings, int(rope.original_max_position_embeddings * rope.factor))
    return fields.max_position_embeddings
