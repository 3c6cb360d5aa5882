"""The engine core at the other end of the pipe: it starts, dies, stands still, sends garbage."""

import asyncio
import threading
import time

import pytest

from evenhand_engine.backends.local import LocalBackend
from evenhand_engine.config import EngineConfig
from evenhand_engine.errors import EngineDeadError, StartupError
from evenhand_engine.messages import (
    AddRequest,
    EngineFailed,
    Reconfigure,
    StartupFailed,
    StepOutputs,
)
from evenhand_policy.config import SchedulerConfig, TenantConfig

from .local_backend import Notes, ask, collect, connected, read, stats
from .scripted_core import WAIT_SECONDS, ScriptedCore


async def test_config_arrives_whole() -> None:
    core = ScriptedCore()
    config = SchedulerConfig(tenants=(TenantConfig(tenant_id="a", weight=3),))
    async with connected(core) as backend:
        backend.reconfigure(config)
        assert (await asyncio.to_thread(core.expect, Reconfigure)).config == config


@pytest.mark.parametrize("says_why", [False, True])
async def test_death_ends_every_stream(says_why: bool) -> None:
    core = ScriptedCore()
    async with connected(core) as backend:
        tasks = [asyncio.create_task(collect(backend, name)) for name in "abc"]
        for _ in tasks:
            await asyncio.to_thread(core.expect, AddRequest)
        if says_why:
            core.send(EngineFailed(message="out of luck"))
        core.die()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(result, EngineDeadError) for result in results)
        assert backend.died.is_set()
        assert backend.failure is not None
        assert ("out of luck" in backend.failure) == says_why
        with pytest.raises(EngineDeadError):
            await collect(backend, "d")


async def test_start_up_failure_carries_the_message() -> None:
    class Failing(ScriptedCore):
        def start(self) -> None:
            self.send(StartupFailed(message="no such model"))

    async with connected(Failing()) as backend:
        with pytest.raises(StartupError, match="no such model"):
            await backend.start()


async def test_death_during_start_up() -> None:
    class Dying(ScriptedCore):
        def start(self) -> None:
            self.die()

    async with connected(Dying()) as backend:
        with pytest.raises(StartupError, match="ended unexpectedly"):
            await backend.start()


async def test_a_core_that_loads_a_model_is_not_waited_for() -> None:
    """It would answer once it is done; here that is never."""

    class Loading(ScriptedCore):
        def start(self) -> None: ...

        def die(self) -> None: ...

    core, killed = Loading(), threading.Event()
    process, connection = core.spawn(EngineConfig())
    process.kill = lambda: (killed.set(), ScriptedCore.die(core))  # type: ignore[assignment, method-assign]
    async with asyncio.timeout(WAIT_SECONDS):
        await LocalBackend(process, connection).close(timeout=10 * WAIT_SECONDS)
    assert killed.is_set()


async def test_garbage_from_the_core_is_its_death() -> None:
    core = ScriptedCore()
    async with connected(core) as backend:
        await backend.start()
        core.send_bytes(b"\xc1")
        await asyncio.wait_for(backend.died.wait(), WAIT_SECONDS)
        assert backend.failure is not None and "unreadable" in backend.failure


async def test_progress_is_steps_not_messages() -> None:
    core = ScriptedCore()
    async with connected(core) as backend:
        await backend.start()
        assert backend.seconds_without_progress(time.monotonic() + 1000) == 0, "idle"
        reading = asyncio.create_task(collect(backend, "a"))
        await asyncio.to_thread(core.expect, AddRequest)
        arrived = asyncio.Event()
        backend.on_stats(lambda _: arrived.set())
        core.send(StepOutputs(outputs=(), stats=stats(1)))
        await asyncio.wait_for(arrived.wait(), WAIT_SECONDS)
        before = backend.seconds_without_progress(1e9)
        for step_id, is_progress in ((1, False), (2, True)):
            arrived.clear()
            core.send(StepOutputs(outputs=(), stats=stats(step_id)))
            await asyncio.wait_for(arrived.wait(), WAIT_SECONDS)
            assert (backend.seconds_without_progress(1e9) < before) == is_progress
        reading.cancel()


async def test_a_core_that_does_not_read_does_not_block_the_loop() -> None:
    class Deaf(ScriptedCore):
        def _run(self, connection: object) -> None:
            return None

    core = Deaf()
    async with connected(core) as backend:
        readers = [asyncio.create_task(collect(backend, str(number))) for number in range(50)]
        blocked = asyncio.ensure_future(anext(read(backend.generate(ask("huge", range(300_000)), Notes()))))
        async with asyncio.timeout(WAIT_SECONDS):
            for _ in range(100):
                await asyncio.sleep(0)
        for task in [*readers, blocked]:
            task.cancel()
        core.die()
