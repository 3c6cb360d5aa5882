"""The engine core as a backend: a scripted core at the other end of a real pipe."""

import asyncio
import tracemalloc
from collections.abc import Iterable

import pytest

from evenhand_engine.backends.backend import Delta, Ending
from evenhand_engine.messages import (
    AbortRequest,
    AddRequest,
    Reconfigure,
)
from evenhand_engine.scheduler.request import FinishReason, RequestOutput
from evenhand_policy.config import SchedulerConfig

from .local_backend import Notes, ask, collect, connected, output, read, text
from .scripted_core import WAIT_SECONDS, ScriptedCore


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
        assert isinstance(await asyncio.to_thread(core.received.get, True, WAIT_SECONDS), Reconfigure)
        assert notes.endings == [Ending(FinishReason.STOP, 1)]


async def test_what_all_say_goes_before_what_is_noted_of_those_that_end() -> None:
    told: list[str] = []

    class Telling(Notes):
        def ended(self, ending: Ending, now: float) -> None:
            told.append("ended")
            super().ended(ending, now)

    core, notes = ScriptedCore(), (Telling(), Telling())
    async with connected(core) as backend:
        await backend.start()
        for name, each in zip("ab", notes, strict=True):
            backend.generate(ask(name), each).listen(lambda: told.append("said"))
            await asyncio.to_thread(core.expect, AddRequest)
        core.output(*(output(name, 65, finish=FinishReason.LENGTH) for name in "ab"))
        for each in notes:
            await asyncio.wait_for(each.has_ended.wait(), WAIT_SECONDS)
        assert told == ["said", "said", "ended", "ended"]


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
