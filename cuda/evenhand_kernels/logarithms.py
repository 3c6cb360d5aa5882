"""`Kernels.log_probabilities` in torch: the reference, and what serves where nothing can be compiled."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from evenhand_kernels.kernels import LogProbabilities

_BLOCK = 64  # tokens whose largest is looked at first


def log_probabilities(logits: Tensor, token_ids: Sequence[int], num_top: int) -> LogProbabilities:
    """See `Kernels.log_probabilities`."""
    logprobs = torch.log_softmax(logits, dim=-1)
    own = logprobs.gather(1, torch.tensor(token_ids, dtype=torch.int64)[:, None]).numpy()
    ranks = np.count_nonzero(logprobs.numpy() > own, axis=1) + 1
    values, ids = largest(logprobs, min(num_top, logprobs.shape[1]))
    return LogProbabilities(own[:, 0], ranks.astype(np.int32), ids.int().numpy(), values.numpy())


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
