"""The engine core as a backend: a scripted core at the other end of a real pipe."""

import asyncio
import contextlib
import threading
import time
import tracemalloc
from array import array
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import msgspec
import pytest

from evenhand_engine.backends.backend import Delta, Ending, GenerationRequest, Stream
from evenhand_engine.backends.local import LocalBackend
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
from evenhand_engine.text.detokenizer import text_of
from evenhand_engine.text.text_decoder import TextDecoder, WindowDecoder
from evenhand_engine.text.tokenizer import Tokenizer
from evenhand_policy.config import SchedulerConfig, TenantConfig

from .conftest import WAIT_SECONDS, ScriptedCore, idle_stats


def ask(
    request_id: str, prompt: Iterable[int] = (1, 2, 3), *, max_tokens: int = 5, **options: Any
) -> GenerationRequest:
    return GenerationRequest(
        request_id=request_id,
        tenant_id="t",
        prompt_token_ids=array("I", prompt),
        sampling_params=SamplingParams(max_tokens=max_tokens),
        arrival_time=0.0,
        **options,
    )


@dataclass
class Notes:
    """An Observer that writes down what it is told."""

    started_with: int | None = None
    num_tokens: int = 0
    endings: list[Ending] = field(default_factory=list)
    has_ended: asyncio.Event = field(default_factory=asyncio.Event)

    def started(self, num_cached_tokens: int, now: float) -> None:
        assert self.started_with is None and not self.endings
        self.started_with = num_cached_tokens

    def generated(self, num_tokens: int, now: float) -> None:
        assert self.started_with is not None and not self.endings
        self.num_tokens += num_tokens

    def ended(self, ending: Ending, now: float) -> None:
        self.endings.append(ending)
        self.has_ended.set()


def output(request_id: str, *token_ids: int, finish: FinishReason | None = None) -> RequestOutput:
    return RequestOutput(request_id=request_id, token_ids=token_ids, finish_reason=finish)


def stats(step_id: int) -> EngineStats:
    return msgspec.structs.replace(idle_stats(""), step_id=step_id)


class Letters:
    """A tokenizer whose token ids are code points."""

    def text_decoder(self, context: Sequence[int], skip_special_tokens: bool) -> TextDecoder:
        return WindowDecoder(lambda token_ids: "".join(map(chr, token_ids)), context)


async def read(stream: Stream) -> AsyncIterator[Delta]:
    """Each delta as soon as there is one, until the last."""
    news, delta = asyncio.Event(), None
    stream.listen(news.set)
    while delta is None or delta.finish_reason is None:
        if (delta := stream.take()) is not None:
            yield delta
        else:
            news.clear()
            await news.wait()


@contextlib.asynccontextmanager
async def connected(core: ScriptedCore) -> AsyncIterator[LocalBackend]:
    backend = LocalBackend(*core.spawn(EngineConfig()))
    backend.tokenizer = cast(Tokenizer, Letters())
    try:
        yield backend
    finally:
        await backend.close()


async def collect(backend: LocalBackend, request_id: str) -> list[Delta]:
    return [delta async for delta in read(backend.generate(ask(request_id), Notes()))]


def text(deltas: Iterable[Delta]) -> str:
    return "".join(text_of(delta.pieces) for delta in deltas)


async def test_each_stream_gets_its_own_outputs_in_order() -> None:
    core = ScriptedCore()
    async with connected(core) as backend:
        await backend.start()
        tasks = [asyncio.create_task(collect(backend, name)) for name in "ab"]
        for _ in tasks:
            await asyncio.to_thread(core.expect, AddRequest)
        core.output(output("a"), output("b", 65), output("unknown", 9))
        core.output(output("b", 66, finish=FinishReason.LENGTH), output("a", 67), output("a", 68, 69))
        core.output(output("a", finish=FinishReason.LENGTH))
        a, b = await asyncio.gather(*tasks)
        assert (text(a), text(b)) == ("CDE", "AB")
        assert [sum(delta.num_tokens for delta in deltas) for deltas in (a, b)] == [3, 2]
        assert backend.num_in_flight == 0


@pytest.mark.parametrize("is_cancelled", [False, True])
async def test_closing_aborts_and_the_core_says_when_it_is_over(is_cancelled: bool) -> None:
    """What it computes until then is told, although nobody reads it."""

    class Slow(ScriptedCore):
        def ending(self, abort: AbortRequest) -> RequestOutput:
            self.output(output("a", 66))
            return RequestOutput(request_id="a", finish_reason=abort.reason, num_output_tokens=3, num_preemptions=1)

    core, notes = Slow(), Notes()
    async with connected(core) as backend:
        stream = backend.generate(ask("a"), notes)
        reading = asyncio.ensure_future(anext(read(stream)))
        await asyncio.to_thread(core.expect, AddRequest)
        if is_cancelled:
            reading.cancel()
        else:
            core.output(output("a", 65))
            await reading
        stream.close()
        assert backend.num_in_flight == 1
        abort = await asyncio.to_thread(core.expect, AbortRequest)
        assert (abort.request_id, abort.reason, abort.num_output_tokens) == ("a", FinishReason.ABORT, None)
        await asyncio.wait_for(notes.has_ended.wait(), WAIT_SECONDS)
        assert notes.endings == [Ending(FinishReason.ABORT, 3, 1)]
        assert notes.num_tokens == (1 if is_cancelled else 2)
        assert backend.num_in_flight == 0
        assert stream.take() is None


async def test_a_finished_request_is_not_aborted() -> None:
    core = ScriptedCore(lambda request: [output(request.request_id, 65, finish=FinishReason.STOP)])
    async with connected(core) as backend:
        notes = Notes()
        stream = backend.generate(ask("a"), notes)
        assert [delta.finish_reason async for delta in read(stream)] == [FinishReason.STOP]
        stream.close()
        backend.reconfigure(SchedulerConfig())
        await asyncio.to_thread(core.expect, AddRequest)
        assert isinstance(await asyncio.to_thread(core.received.get, True, 10), Reconfigure)
        assert notes.endings == [Ending(FinishReason.STOP, 1)]


async def test_a_request_that_is_refused_in_the_queue_has_not_started() -> None:
    core = ScriptedCore(lambda request: [output(request.request_id, finish=FinishReason.QUEUE_TIMEOUT)])
    async with connected(core) as backend:
        notes = Notes()
        deltas = [delta async for delta in read(backend.generate(ask("a"), notes))]
        assert deltas == [Delta([], 0, FinishReason.QUEUE_TIMEOUT)]
        assert (notes.started_with, notes.endings) == (None, [Ending(FinishReason.QUEUE_TIMEOUT, 0)])


async def test_stop_strings_are_found_though_nobody_reads() -> None:
    """Otherwise a client that does not read would have thousands of tokens computed, and all but a few given back."""

    def endless(request: AddRequest) -> Iterable[RequestOutput]:
        yield output(request.request_id)
        for letter in "once STOP upon":
            yield output(request.request_id, ord(letter))

    core, notes = ScriptedCore(endless), Notes()
    async with connected(core) as backend:
        stream = backend.generate(ask("a", stop=("STOP",)), notes)
        abort = await asyncio.to_thread(core.expect, AbortRequest)
        assert (abort.reason, abort.num_output_tokens) == (FinishReason.STOP, len("once STOP"))
        await asyncio.wait_for(notes.has_ended.wait(), WAIT_SECONDS)
        assert notes.endings[0].num_output_tokens == len("once STOP upon"), "what was computed counts"
        [delta] = [delta async for delta in read(stream)]
        assert (text([delta]), delta.num_tokens, delta.finish_reason) == ("once ", len("once STOP"), FinishReason.STOP)
        stream.close()
        assert core.received.empty(), "ended once"


async def test_what_is_not_read_is_one_record() -> None:
    """1,000 streams of 8,000 unread tokens stay below 100 MiB; traced memory is slow, so fewer here."""
    num_streams, num_tokens = 2, 4000

    def endless(request: AddRequest) -> Iterable[RequestOutput]:
        yield output(request.request_id)

    core = ScriptedCore(endless)
    async with connected(core) as backend:
        all_notes = [Notes() for _ in range(num_streams)]
        streams = [backend.generate(ask(str(i)), notes) for i, notes in enumerate(all_notes)]
        while any(notes.started_with is None for notes in all_notes):
            await asyncio.sleep(0.01)
        tracemalloc.start()
        try:
            for i, stream in enumerate(streams):
                for start in range(0, num_tokens, 4):
                    letters = (97 + (i + start) % 26, 98, 99, 32)
                    stream.receive(output(str(i), *letters), 0.0)
            taken = tracemalloc.get_traced_memory()[0]
        finally:
            tracemalloc.stop()
        assert taken / (num_streams * num_tokens) < 100 * 2**20 / (1000 * 8000)
        delta = streams[1].take()
        assert delta is not None
        assert delta.num_tokens == sum(len(piece.token_ids) for piece in delta.pieces) == num_tokens
        assert text([delta])[:8] == "bbc fbc "


async def test_a_text_that_cannot_be_read_ends_its_own_request_only(caplog: pytest.LogCaptureFixture) -> None:
    core = ScriptedCore()
    async with connected(core) as backend:
        tasks = [asyncio.create_task(collect(backend, name)) for name in "ab"]
        for _ in tasks:
            await asyncio.to_thread(core.expect, AddRequest)
        core.output(output("a", 2**31), output("b", 66, finish=FinishReason.LENGTH))
        a, b = await asyncio.gather(*tasks)
        assert (a[-1].finish_reason, text(b)) == (FinishReason.ERROR, "B")
        assert (await asyncio.to_thread(core.expect, AbortRequest)).reason is FinishReason.ERROR
    assert "cannot be read" in caplog.text


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
        await asyncio.wait_for(backend.died.wait(), 10)
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
        await asyncio.wait_for(arrived.wait(), 10)
        before = backend.seconds_without_progress(1e9)
        for step_id, is_progress in ((1, False), (2, True)):
            arrived.clear()
            core.send(StepOutputs(outputs=(), stats=stats(step_id)))
            await asyncio.wait_for(arrived.wait(), 10)
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
        async with asyncio.timeout(10):
            for _ in range(100):
                await asyncio.sleep(0)
        for task in [*readers, blocked]:
            task.cancel()
        core.die()
