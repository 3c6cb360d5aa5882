"""The client against a scripted core at the other end of a real pipe."""

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncIterator

import pytest

from evenhand_engine.backends.engine_client import EngineClient
from evenhand_engine.config import EngineConfig
from evenhand_engine.errors import EngineDeadError, StartupError
from evenhand_engine.messages import (
    AbortRequest,
    AddRequest,
    EngineFailed,
    EngineStats,
    Reconfigure,
    StartupFailed,
    StepOutputs,
)
from evenhand_engine.scheduler.request import FinishReason, RequestOutput, SamplingParams
from evenhand_policy.config import SchedulerConfig, TenantConfig

from .conftest import WAIT_SECONDS, ScriptedCore


def add(request_id: str) -> AddRequest:
    return AddRequest(
        request_id=request_id,
        tenant_id="t",
        prompt_token_ids=[1, 2, 3],
        sampling_params=SamplingParams(max_tokens=5),
        arrival_time=0.0,
    )


def output(request_id: str, *token_ids: int, finish: FinishReason | None = None) -> RequestOutput:
    return RequestOutput(request_id=request_id, token_ids=token_ids, finish_reason=finish)


def stats(step_id: int) -> EngineStats:
    return EngineStats(
        time=0.0,
        step_id=step_id,
        num_running=1,
        num_waiting=0,
        num_deferred=0,
        num_kv_blocks=1,
        num_free_kv_blocks=1,
        num_preemptions=0,
        num_prefix_queries=0,
        num_prefix_hits=0,
        virtual_time=0.0,
        config_digest="",
        step_tokens=(),
        step_seconds=(),
        tenants=(),
    )


@contextlib.asynccontextmanager
async def connected(core: ScriptedCore) -> AsyncIterator[EngineClient]:
    client = EngineClient(*core.spawn(EngineConfig()))
    try:
        yield client
    finally:
        await client.close()


async def collect(client: EngineClient, request_id: str) -> list[RequestOutput]:
    return [arrival.output async for arrival in client.generate(add(request_id))]


async def test_each_stream_gets_its_own_outputs_in_order() -> None:
    core = ScriptedCore()
    async with connected(core) as client:
        await client.start()
        tasks = [asyncio.create_task(collect(client, name)) for name in "ab"]
        for _ in tasks:
            await asyncio.to_thread(core.expect, AddRequest)
        core.output(output("a"), output("b", 1), output("unknown", 9))
        core.output(output("b", 2, finish=FinishReason.STOP), output("a", 3), output("a", 4, 5))
        core.output(output("a", finish=FinishReason.LENGTH))
        a, b = await asyncio.gather(*tasks)
        assert [o.token_ids for o in a] == [(), (3,), (4, 5), ()]
        assert [o.token_ids for o in b] == [(1,), (2,)]
        assert client.num_in_flight == 0


async def test_closing_the_iterator_aborts() -> None:
    core = ScriptedCore()
    async with connected(core) as client:
        outputs = client.generate(add("a"))
        reading = asyncio.ensure_future(anext(outputs))
        await asyncio.to_thread(core.expect, AddRequest)
        core.output(output("a", 1))
        await reading
        await outputs.aclose()
        abort = await asyncio.to_thread(core.expect, AbortRequest)
        assert (abort.request_id, abort.reason, abort.num_output_tokens) == ("a", FinishReason.ABORT, None)


async def test_cancelling_the_reader_aborts() -> None:
    core = ScriptedCore()
    async with connected(core) as client:
        reading = asyncio.create_task(collect(client, "a"))
        await asyncio.to_thread(core.expect, AddRequest)
        reading.cancel()
        assert (await asyncio.to_thread(core.expect, AbortRequest)).request_id == "a"
        assert client.num_in_flight == 0


async def test_a_finished_request_is_not_aborted() -> None:
    core = ScriptedCore(lambda request: [output(request.request_id, 1, finish=FinishReason.STOP)])
    async with connected(core) as client:
        await collect(client, "a")
        client.abort("a")
        client.reconfigure(SchedulerConfig())
        await asyncio.to_thread(core.expect, AddRequest)
        assert isinstance(await asyncio.to_thread(core.received.get, True, 10), Reconfigure)


async def test_config_arrives_whole() -> None:
    core = ScriptedCore()
    config = SchedulerConfig(tenants=(TenantConfig(tenant_id="a", weight=3),))
    async with connected(core) as client:
        client.reconfigure(config)
        assert (await asyncio.to_thread(core.expect, Reconfigure)).config == config


@pytest.mark.parametrize("says_why", [False, True])
async def test_death_ends_every_stream(says_why: bool) -> None:
    core = ScriptedCore()
    async with connected(core) as client:
        tasks = [asyncio.create_task(collect(client, name)) for name in "abc"]
        for _ in tasks:
            await asyncio.to_thread(core.expect, AddRequest)
        if says_why:
            core.send(EngineFailed(message="out of luck"))
        core.die()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(result, EngineDeadError) for result in results)
        assert client.died.is_set()
        assert client.failure is not None
        assert ("out of luck" in client.failure) == says_why
        with pytest.raises(EngineDeadError):
            await collect(client, "d")


async def test_start_up_failure_carries_the_message() -> None:
    class Failing(ScriptedCore):
        def start(self) -> None:
            self.send(StartupFailed(message="no such model"))

    async with connected(Failing()) as client:
        with pytest.raises(StartupError, match="no such model"):
            await client.start()


async def test_death_during_start_up() -> None:
    class Dying(ScriptedCore):
        def start(self) -> None:
            self.die()

    async with connected(Dying()) as client:
        with pytest.raises(StartupError, match="ended unexpectedly"):
            await client.start()


async def test_a_core_that_loads_a_model_is_not_waited_for() -> None:
    """It would answer once it is done; here that is never."""

    class Loading(ScriptedCore):
        def start(self) -> None: ...

        def die(self) -> None: ...

    core, killed = Loading(), threading.Event()
    process, connection = core.spawn(EngineConfig())
    process.kill = lambda: (killed.set(), ScriptedCore.die(core))  # type: ignore[assignment, method-assign]
    async with asyncio.timeout(WAIT_SECONDS):
        await EngineClient(process, connection).close(timeout=10 * WAIT_SECONDS)
    assert killed.is_set()


async def test_garbage_from_the_core_is_its_death() -> None:
    core = ScriptedCore()
    async with connected(core) as client:
        await client.start()
        core.send_bytes(b"\xc1")
        await asyncio.wait_for(client.died.wait(), 10)
        assert client.failure is not None and "unreadable" in client.failure


async def test_progress_is_steps_not_messages() -> None:
    core = ScriptedCore()
    async with connected(core) as client:
        await client.start()
        assert client.seconds_without_progress(time.monotonic() + 1000) == 0, "idle"
        reading = asyncio.create_task(collect(client, "a"))
        await asyncio.to_thread(core.expect, AddRequest)
        arrived = asyncio.Event()
        client.on_stats(lambda _: arrived.set())
        core.send(StepOutputs(outputs=(), stats=stats(1)))
        await asyncio.wait_for(arrived.wait(), 10)
        before = client.seconds_without_progress(1e9)
        for step_id, is_progress in ((1, False), (2, True)):
            arrived.clear()
            core.send(StepOutputs(outputs=(), stats=stats(step_id)))
            await asyncio.wait_for(arrived.wait(), 10)
            assert (client.seconds_without_progress(1e9) < before) == is_progress
        reading.cancel()


async def test_a_core_that_does_not_read_does_not_block_the_loop() -> None:
    class Deaf(ScriptedCore):
        def _run(self, connection: object) -> None:
            return None

    core = Deaf()
    async with connected(core) as client:
        readers = [asyncio.create_task(collect(client, str(number))) for number in range(50)]
        huge = add("huge")
        huge = AddRequest(
            request_id="huge",
            tenant_id="t",
            prompt_token_ids=list(range(300_000)),
            sampling_params=huge.sampling_params,
            arrival_time=0.0,
        )
        blocked = asyncio.create_task(anext(client.generate(huge)))
        async with asyncio.timeout(10):
            for _ in range(100):
                await asyncio.sleep(0)
        for task in [*readers, blocked]:
            task.cancel()
        core.die()
