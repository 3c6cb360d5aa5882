"""Log probabilities as the engine tells them: each row as many as it asks for."""

import torch

from evenhand_engine.core.token_logprobs import describe
from evenhand_kernels.reference import ReferenceKernels


def test_each_row_has_as_many_as_it_asks_for() -> None:
    logits = torch.arange(200.0).expand(3, -1)
    logprobs = torch.log_softmax(logits, dim=-1)
    found = describe(ReferenceKernels(), logits, [199, 0, 150], [0, 2, 1])
    assert [one.rank for one in found] == [1, 200, 50]
    assert [one.top_token_ids for one in found] == [(), (199, 198), (199,)]
    assert [one.logprob for one in found] == [logprobs[0, 199].item(), logprobs[1, 0].item(), logprobs[2, 150].item()]
    assert found[1].top_logprobs == tuple(logprobs[1, [199, 198]].tolist())
    assert describe(ReferenceKernels(), logits[:0], [], []) == []
