"""Log probabilities of tokens by their rows of logits, with the likeliest ones beside them."""

from collections.abc import Sequence

from torch import Tensor

from evenhand_engine.scheduler.request import TokenLogprobs
from evenhand_kernels.kernels import Kernels


def describe(kernels: Kernels, logits: Tensor, token_ids: Sequence[int], num_top: Sequence[int]) -> list[TokenLogprobs]:
    """Of a token in each row, with as many of the row's likeliest.

    Args:
        logits: float32 [num_rows, vocab_size].
        token_ids: [num_rows].
        num_top: [num_rows].
    """
    if not token_ids:
        return []
    found = kernels.log_probabilities(logits, token_ids, max(num_top))
    rows = zip(
        found.own.tolist(), found.ranks.tolist(), found.top_token_ids.tolist(), found.top.tolist(), num_top, strict=True
    )
    return [
        TokenLogprobs(logprob=logprob, rank=rank, top_token_ids=tuple(best[:num]), top_logprobs=tuple(told[:num]))
        for logprob, rank, best, told, num in rows
    ]
