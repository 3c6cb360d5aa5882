"""Log probabilities of tokens by their rows of logits, with the likeliest ones beside them."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from evenhand_engine.scheduler.request import TokenLogprobs

_BLOCK = 64  # tokens whose largest is looked at first


def describe(logprobs: Tensor, token_ids: Sequence[int], num_top: Sequence[int]) -> list[TokenLogprobs]:
    """Of a token in each row, with as many of the row's likeliest.

    Args:
        logprobs: float32 [num_rows, vocab_size].
        token_ids: [num_rows].
        num_top: [num_rows].
    """
    if not token_ids:
        return []
    own = logprobs.gather(1, torch.tensor(token_ids)[:, None])
    ranks = np.count_nonzero(logprobs.numpy() > own.numpy(), axis=1) + 1
    values, ids = largest(logprobs, min(max(num_top), logprobs.shape[1]))
    rows = zip(own[:, 0].tolist(), ranks.tolist(), ids.tolist(), values.tolist(), num_top, strict=True)
    return [
        TokenLogprobs(logprob=logprob, rank=rank, top_token_ids=tuple(best[:num]), top_logprobs=tuple(told[:num]))
        for logprob, rank, best, told, num in rows
    ]


def largest(rows: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """The `number` largest of each row and where they are, [num_rows, number] each; of equal ones any, the first one first.

    They are in those `number` blocks whose own largest are the largest: all others are looked at once, which is quick.
    """
    num_rows, size = rows.shape
    num_blocks = size // _BLOCK
    if number == 0 or num_blocks <= number:
        return _sorted(rows, torch.arange(size).expand(num_rows, size), number)
    blocks = rows[:, : num_blocks * _BLOCK].view(num_rows, num_blocks, _BLOCK).amax(dim=2).topk(number, dim=1).indices
    places = (blocks[:, :, None] * _BLOCK + torch.arange(_BLOCK)).view(num_rows, -1)
    rest = torch.arange(num_blocks * _BLOCK, size).expand(num_rows, -1)
    places = torch.cat((places, rest), dim=1)
    return _sorted(rows.gather(1, places), places, number)


def _sorted(values: Tensor, places: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """The largest of these, the first of equals first."""
    order = places.argsort(dim=1)
    values, places = values.gather(1, order), places.gather(1, order)
    found = values.argsort(dim=1, descending=True, stable=True)[:, :number]
    return values.gather(1, found), places.gather(1, found)
