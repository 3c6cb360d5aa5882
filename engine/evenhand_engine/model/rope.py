"""Rotary position embedding: the table of cosines and sines for every position (arXiv 2104.09864).

Frequencies are computed as `transformers.modeling_rope_utils` does, in float32 and in the same order of operations,
since an angle at position 8,000 magnifies a frequency's rounding error 8,000 times.
"""

import math

import torch
from torch import Tensor

from evenhand_engine.model.rope_config import RopeConfig


def cos_sin_table(rope: RopeConfig, head_dim: int, num_positions: int) -> Tensor:
    """float32 [num_positions, head_dim]: the cosines of the head_dim / 2 angles, then their sines.

    A head is rotated in pairs (i, i + head_dim / 2). `num_positions` is the longest context that will be served; only
    LongRoPE's choice of factors depends on it.
    """
    frequencies, scale = _frequencies(rope, head_dim, num_positions)
    angles = torch.arange(num_positions, dtype=torch.float32)[:, None] * frequencies[None, :]
    return torch.cat((angles.cos() * scale, angles.sin() * scale), dim=1)


def _frequencies(rope: RopeConfig, head_dim: int, num_positions: int) -> tuple[Tensor, float]:
    """Radians per position, float32 [head_dim / 2], and what cosines and sines are multiplied with."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    wavelengths = rope.theta**exponents  # over 2 pi
    match rope.rope_type:
        case "linear":
            return 1.0 / wavelengths / rope.factor, 1.0
        case "llama3":
            return _llama3(rope, 1.0 / wavelengths), 1.0
        case "yarn":
            return _yarn(rope, wavelengths), _yarn_scale(rope)
        case "longrope":
            long = num_positions > rope.original_max_position_embeddings
            factors = torch.tensor(rope.long_factor if long else rope.short_factor)
            return 1.0 / (factors * wavelengths), _longrope_scale(rope)
    return 1.0 / wavelengths, 1.0  # "dynamic" too: it changes nothing inside the context that the model declares


def _llama3(rope: RopeConfig, frequencies: Tensor) -> Tensor:
    """Slow frequencies are divided by the factor, fast ones are kept, those between are blended (Llama 3.1)."""
    original = rope.original_max_position_embeddings
    wavelengths = 2 * math.pi / frequencies
    slow = wavelengths > original / rope.low_freq_factor
    fast = wavelengths < original / rope.high_freq_factor
    blend = (original / wavelengths - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blended = (1 - blend) * frequencies / rope.factor + blend * frequencies
    return torch.where(slow, frequencies / rope.factor, torch.where(fast, frequencies, blended))


def _yarn(rope: RopeConfig, wavelengths: Tensor) -> Tensor:
    """Interpolates the dimensions that turn less than beta_slow times in the original context, keeps those that turn
    more than beta_fast times, and blends linearly between (arXiv 2309.00071, section 3.2)."""
    head_dim = 2 * len(wavelengths)

    def dimension(num_turns: float) -> float:
        original = rope.original_max_position_embeddings
        return head_dim * math.log(original / (num_turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    ramp = (torch.arange(len(wavelengths), dtype=torch.float32) - low) / (max(high - low, 0.001))
    kept = 1 - ramp.clamp(0, 1)
    return 1.0 / (rope.factor * wavelengths) * (1 - kept) + 1.0 / wavelengths * kept


def _yarn_scale(rope: RopeConfig) -> float:
    if rope.attention_factor is not None:
        return rope.attention_factor

    def mscale(weight: float) -> float:
        return 1.0 if rope.factor <= 1 else 0.1 * weight * math.log(rope.factor) + 1.0

    if rope.mscale and rope.mscale_all_dim:
        return mscale(rope.mscale) / mscale(rope.mscale_all_dim)
    return mscale(1.0)


def _longrope_scale(rope: RopeConfig) -> float:
    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.factor <= 1:
        return 1.0
    return math.sqrt(1 + math.log(rope.factor) / math.log(rope.original_max_position_embeddings))
