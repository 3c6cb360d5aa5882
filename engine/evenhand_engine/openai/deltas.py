"""Deltas: what the choices of one answer say, read in the very call in which it comes.

To wake a task for each token costs more than the token does. So a reader gives a function, which is called with each delta as the
backend brings it, until it wants no more: because its client does not keep up, perhaps. What comes meanwhile is coalesced.
"""

import asyncio
import functools
from collections.abc import Callable, Sequence
from typing import Self

from evenhand_engine.backends.backend import Delta, Say
from evenhand_engine.frontend.door import Door
from evenhand_engine.openai.errors import refuse_finished
from evenhand_engine.openai.generation import Generation, Unanswered
from evenhand_engine.scheduler.request import FinishReason

Take = Callable[[int, Delta], bool]
"""Is given the index of a generation and what it says; returns whether it takes more."""


class Deltas:
    """For one reader.

    Args:
        generations: which have begun. The first error of any is the answer's.
        door: knows how long the queue is.
    """

    _take: Take  # of who waits

    __slots__ = (
        "_done",
        "_door",
        "_generations",
        "_is_advancing",
        "_num_open",
        "_ready",
        "_take",
    )

    def __init__(self, generations: Sequence[Generation], door: Door) -> None:
        self._generations = generations
        self._door = door
        self._ready: dict[int, None] = {}  # generations that have something to take, by how long they have
        self._num_open = len(generations)
        self._done: asyncio.Future[bool] | None = None  # what the reader waits for, if there is one
        self._is_advancing = False
        for index, generation in enumerate(generations):
            generation.listen(functools.partial(self._hear, index))

    async def hand_on(self, take: Take) -> bool:
        """Give each delta to `take`, until it wants no more (True) or there are no more (False).

        Raises Refusal if a request ended without a result, EngineDeadError if the backend died, and what `take` raises.
        """
        self._take, self._done = take, asyncio.get_running_loop().create_future()
        if self._ready:
            self._hear(self._next())
        elif not self._num_open:
            self._done.set_result(False)
        try:
            return await self._done
        except Unanswered as ended:
            delay = 0.0
            if ended.reason is FinishReason.QUEUE_TIMEOUT:
                delay = await self._door.queue_delay(ended.tenant_id)
            refusal = refuse_finished(ended.reason, delay)
            assert refusal is not None
            raise refusal from None
        finally:
            self._done = None

    def pass_text(self, index: int, say: Say) -> None:
        """For `take`: let a generation's text go to `say`, as long as the reader takes any and there is no other news of it."""
        self._generations[index].pass_text(say)

    def fill(self) -> None:
        """For a `say`: the reader wants no more."""
        if self._done is not None and not self._done.done():
            self._done.set_result(True)
        self._keep_text()

    def _keep_text(self) -> None:
        for generation in self._generations:
            generation.pass_text(None)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> tuple[int, Delta]:
        """The next alone."""
        found: list[tuple[int, Delta]] = []

        def take(index: int, delta: Delta) -> bool:
            found.append((index, delta))
            return False

        await self.hand_on(take)
        if not found:
            raise StopAsyncIteration
        return found[0]

    def _next(self) -> int:
        index = next(iter(self._ready))
        del self._ready[index]
        return index

    def _conclude(self, index: int, delta: Delta) -> Delta:
        delta = self._generations[index].conclude(delta)
        if delta.finish_reason is not None:
            self._num_open -= 1
        return delta

    def _hear(self, index: int) -> None:
        """There is something to take: hand it on, and what comes by that. Called by the backend, for every token: so it is
        one function, and whatever is raised is the reader's."""
        done = self._done
        if done is None or self._is_advancing or done.done():
            self._ready[index] = None
            return
        hand, self._is_advancing = self._take, True
        try:
            while True:
                take = self._generations[index].take
                delta = take()
                if delta is not None:
                    if delta.finish_reason is not None:
                        delta = self._conclude(index, delta)
                    if not hand(index, delta):
                        done.set_result(True)
                        break
                if not self._ready:
                    break
                index = self._next()
            if not self._num_open and not done.done():
                done.set_result(False)
        except Exception as error:
            done.set_exception(error)
        finally:
            self._is_advancing = False
            if done.done():
                self._keep_text()
