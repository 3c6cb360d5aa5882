"""Doors, in the owner's process and in another: both answer the same."""

import asyncio
import time

import pytest

from evenhand_engine.errors import Refusal
from evenhand_engine.frontend.claims import Demand
from evenhand_engine.frontend.door import Door, OwnDoor

from .joined_doors import DEMAND, enter, joined


async def test_both_doors_answer_the_same() -> None:
    async with joined() as ends:
        doors: list[Door] = [OwnDoor(ends.service), ends.door]
        for door in doors:
            assert (await enter(door, "t"))[1] == 1
            assert [claim.max_tokens for claim in await door.reserve("other", DEMAND)] == [5, 5, 5, 5]
            assert await door.queue_delay("t") >= 1
            assert await door.health() is None
            assert b"vllm:request_success" in await door.metrics_text()
            assert await door.rate_limits("other") in ([], ())
            with pytest.raises(Refusal) as caught:
                await door.reserve("t", Demand(prompt_lengths=(900,), max_tokens=200))
            assert (caught.value.status, caught.value.code) == (400, "context_length_exceeded")
            held, _ = await enter(door, "other", 80)
            with pytest.raises(Refusal, match="take 80 of 100 bytes") as refused:
                await enter(door, "other", 80)
            assert refused.value.retry_after == 1
            held.resize(10)
            (await enter(door, "other", 80))[0].release()
            held.release()
        own, remote = await asyncio.gather(*(door.rate_limits("t") for door in doors))
        assert list(own) == list(remote)
        assert [(limit.unit, limit.limit, limit.remaining) for limit in remote] == [
            ("requests", 4, 2),
            ("tokens", 800, 800),
        ]


@pytest.mark.parametrize("is_remote", [False, True])
@pytest.mark.parametrize("generates", [False, True])
async def test_who_is_not_let_in_holds_nothing(is_remote: bool, generates: bool) -> None:
    """Neither room for a body where the quota is used up, nor a request of the quota where there is no room."""
    async with joined() as ends:
        door: Door = ends.door if is_remote else OwnDoor(ends.service)
        requests, bodies = ends.service.admission.account("t").requests, ends.service.bodies
        assert requests is not None
        requests.rate = 1e-9  # the machine may be slow
        first, _ = await door.enter("t", 90, generates=generates)
        with pytest.raises(Refusal) as refused:
            await door.enter("t", 90, generates=generates)
        assert refused.value.code == "body_bytes" and round(requests.level(time.monotonic())) == 3
        first.release()
        for _ in range(3):
            (await door.enter("t", 90, generates=generates))[0].release()
            await ends.settle()
        with pytest.raises(Refusal) as refused:
            await door.enter("t", 90, generates=generates)
        assert refused.value.code == "requests_per_minute" and bodies.num_bytes("t") == 0
