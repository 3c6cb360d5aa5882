"""What may come next in a step, by seat, and the tokens of texts."""

from array import array

import numpy as np
from tokenizers import pre_tokenizers

from evenhand_engine.core.structures import StructuredStep, Structures
from evenhand_engine.scheduler.batch import Batch, StartedRequest
from evenhand_engine.scheduler.request import Sampled, SamplingParams
from evenhand_kernels.drawing import allowed_tokens

from .conftest import VOCAB_SIZE


def started(seat: int, outputs: tuple[int, ...] = (), request_id: str = "r") -> StartedRequest:
    return StartedRequest(seat, request_id, array("I", (1, 2, *outputs)), 2, SamplingParams(max_tokens=99))


def allowed(structures: Structures, batch: Batch, *sampled: tuple[int, ...]) -> dict[int, set[int]]:
    """Tokens that may come, by row; then these come."""
    step = structures.begin(batch)
    if step is None:
        return {}
    found = allowed_in(step)
    step.advance([Sampled(token_ids) for token_ids in sampled] or [Sampled(())] * len(batch.scheduled))
    return found


def allowed_in(step: StructuredStep) -> dict[int, set[int]]:
    return {row: set(np.flatnonzero(allowed_tokens(mask, VOCAB_SIZE)).tolist()) for row, mask in step.masks().items()}


def token_ids_of(text: bytes) -> list[int]:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    shown = {byte: letters.index(letter) for letter, byte in _letters().items()}
    return [shown[byte] for byte in text]


def _letters() -> dict[str, int]:
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(256 + n): byte for n, byte in enumerate(hidden)}
