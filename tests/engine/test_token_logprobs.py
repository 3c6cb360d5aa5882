"""What is told of a token is what the whole row of logits says, however it is found."""

import pytest
import torch

from evenhand_engine.core.token_logprobs import describe, largest


@pytest.mark.parametrize("size", [1, 5, 63, 64, 65, 640, 1000, 4096 + 7])
@pytest.mark.parametrize("number", [0, 1, 5, 20])
def test_the_largest(size: int, number: int) -> None:
    rows = torch.randn(4, size, generator=torch.Generator().manual_seed(size))
    rows[1] = -torch.inf  # all but one are masked
    rows[1, size // 2] = 0.0
    rows[2] = rows[2].sort(descending=True).values  # all in one block
    number = min(number, size)
    values, places = largest(rows, number)
    expected = rows.topk(number, dim=1)
    assert torch.equal(values, expected.values) and torch.equal(rows.gather(1, places), values)
    assert torch.equal(places[[0, 2, 3]], expected.indices[[0, 2, 3]])


def test_of_equal_ones_the_first_is_told_first() -> None:
    rows = torch.zeros(1, 200)
    rows[0, [7, 150, 190]] = 1.0
    assert largest(rows, 3)[1].tolist() == [[7, 150, 190]]


def test_each_row_has_as_many_as_it_asks_for() -> None:
    logprobs = torch.log_softmax(torch.arange(200.0).expand(3, -1), dim=-1)
    found = describe(logprobs, [199, 0, 150], [0, 2, 1])
    assert [one.rank for one in found] == [1, 200, 50]
    assert [one.top_token_ids for one in found] == [(), (199, 198), (199,)]
    assert [one.logprob for one in found] == [logprobs[0, 199].item(), logprobs[1, 0].item(), logprobs[2, 150].item()]
    assert found[1].top_logprobs == tuple(logprobs[1, [199, 198]].tolist())
    assert describe(logprobs[:0], [], []) == []
