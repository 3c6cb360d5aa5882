"""What is told of a token is what the whole row of logits says, however it is found."""

import math

import numpy as np
import pytest
import torch

from evenhand_kernels.kernels import Kernels
from evenhand_kernels.logarithms import largest


def some_rows(size: int) -> torch.Tensor:
    rows = 5 * torch.randn(5, size, generator=torch.Generator().manual_seed(size))
    rows[1] = -torch.inf  # all but one are masked
    rows[1, size // 2] = 0.0
    rows[2] = rows[2].sort(descending=True).values
    rows[3] = rows[3].sort().values + 1e4
    return rows


@pytest.mark.parametrize("size", [1, 5, 63, 64, 65, 640, 1000, 4096 + 7])
@pytest.mark.parametrize("number", [0, 1, 5, 20])
def test_all_of_it_is_that_of_the_whole_row(kernels: Kernels, size: int, number: int) -> None:
    logits = some_rows(size)
    kept = logits.clone()
    token_ids = [0, size // 2, size - 1, size // 3, size // 2]
    found = kernels.log_probabilities(logits, token_ids, number)
    assert torch.equal(logits, kept), "the logits are still wanted"

    exact = logits.double().log_softmax(dim=-1)
    own = exact[torch.arange(5), torch.tensor(token_ids)]
    assert found.own == pytest.approx(own.numpy(), abs=1e-3, rel=1e-6)
    assert (
        found.ranks.tolist() == (logits > logits.gather(1, torch.tensor(token_ids)[:, None])).sum(dim=1).add(1).tolist()
    )
    top = exact.topk(min(number, size), dim=1)
    assert found.top.shape == found.top_token_ids.shape == top.values.shape
    assert found.top == pytest.approx(top.values.numpy(), abs=1e-3, rel=1e-6)
    assert torch.equal(torch.from_numpy(found.top_token_ids[[0, 2, 3, 4]]).long(), top.indices[[0, 2, 3, 4]])


def test_of_equal_ones_the_first_is_told_first(kernels: Kernels) -> None:
    logits = torch.zeros(1, 200)
    logits[0, [7, 150, 190]] = 1.0
    found = kernels.log_probabilities(logits, [150], 3)
    assert found.top_token_ids.tolist() == [[7, 150, 190]]
    assert found.ranks.tolist() == [1], "nothing is likelier"


def test_a_row_with_a_nan_tells_nothing_and_spoils_no_other(kernels: Kernels) -> None:
    logits = some_rows(300)
    logits[2, 250] = math.nan
    found = kernels.log_probabilities(logits, [4] * 5, 3)
    assert np.isnan(found.own[2]) and np.isnan(found.top[2]).all()
    assert np.isfinite(found.own[[0, 3, 4]]).all() and np.isfinite(found.top[[0, 3, 4]]).all()


def test_no_rows(kernels: Kernels) -> None:
    found = kernels.log_probabilities(torch.empty(0, 10), [], 5)
    assert [len(part) for part in found] == [0, 0, 0, 0]


@pytest.mark.parametrize("number", [0, 3, 20])
def test_the_largest_by_blocks(number: int) -> None:
    rows = some_rows(4096 + 7)
    values, places = largest(rows, number)
    assert torch.equal(values, rows.topk(number, dim=1).values) and torch.equal(rows.gather(1, places), values)
