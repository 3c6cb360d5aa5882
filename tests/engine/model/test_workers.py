"""What the first part of a model tells the others is made once, however many they are."""

from multiprocessing import Pipe
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import Mock

import numpy as np

from evenhand_engine.core.structures import StructuredStep, _Item
from evenhand_engine.core.workers import Workers, _Worker


def test_a_message_is_pickled_once_for_all_workers() -> None:
    class Message:
        num_pickled = 0

        def __reduce__(self) -> tuple[Any, ...]:
            Message.num_pickled += 1
            return dict, ((("masks", 3),),)

    pipes = [Pipe(duplex=False) for _ in range(3)]
    workers = Workers.__new__(Workers)
    workers._workers = [_Worker(rank, Mock(), writer) for rank, (_, writer) in enumerate(pipes, 1)]
    workers.tell(Message())
    assert [reader.recv() for reader, _ in pipes] == [{"masks": 3}] * 3 and Message.num_pickled == 1


def test_the_masks_of_a_step_are_shared_as_one_array() -> None:
    """And are the rows' again on every part."""
    masks = {2: np.array([7, 8], np.int32), 5: np.array([9, -1], np.int32)}
    shared: list[Any] = []

    def share(make: Any) -> Any:
        shared.append(make())
        return shared[-1]

    def item(row: int, follower: object) -> _Item:
        return _Item(
            0, row, cast(Any, SimpleNamespace(first_output=9, num_samples=1, draft_token_ids=())), cast(Any, follower)
        )

    def follower(found: dict[int, Any], is_free: bool) -> SimpleNamespace:
        return SimpleNamespace(masks=lambda _: found, is_free_until=lambda _: is_free)

    items = [item(row, follower({0: mask}, False)) for row, mask in masks.items()]
    found = StructuredStep(items, share).masks()
    assert list(found) == [2, 5] and all((found[row] == masks[row]).all() for row in masks)
    rows, words = shared[0]
    assert rows == [2, 5] and words.shape == (2, 2) and words.flags.c_contiguous
    assert StructuredStep([item(0, follower({}, True))], share).masks() == {} and shared[1] is None
