"""The engine core's loop with a scripted runner: what fails ends by itself alone, and never in silence."""

import contextlib
import logging
import os
import queue
import socket
import threading
from array import array
from collections import deque
from collections.abc import Callable, Iterator
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

import msgspec
import pytest

from evenhand_engine.config import SchedulerSettings
from evenhand_engine.core.connections import Connections
from evenhand_engine.core.engine import EngineCore
from evenhand_engine.core.structures import Structures
from evenhand_engine.messages import AbortRequest, AddRequest, FromCore, Shutdown, StepOutputs, ToCore
from evenhand_engine.scheduler.batch import Batch
from evenhand_engine.scheduler.request import FinishReason, RequestOutput, Sampled, SamplingParams
from evenhand_engine.structured.grammars import GrammarError

SETTINGS = SchedulerSettings(max_num_seqs=4, num_kv_blocks=64, max_model_len=64)
Compute = Callable[[Batch], list[Sampled]]


def sampled(batch: Batch, token_ids: tuple[int, ...] = (7,)) -> list[Sampled]:
    return [Sampled(token_ids) for item in batch.scheduled if item.num_samples]


class ScriptedRunner:
    """Computes by a function, which may raise: at once, or when the result is collected."""

    def __init__(self, compute: Compute, *, pipeline_depth: int = 1, raises_late: bool = False) -> None:
        self.pipeline_depth = pipeline_depth
        self._compute = compute
        self._raises_late = raises_late
        self._results: deque[Callable[[], list[Sampled]]] = deque()

    def submit(self, batch: Batch) -> None:
        if self._raises_late:
            self._results.append(lambda: self._compute(batch))
        else:
            results = self._compute(batch)
            self._results.append(lambda: results)

    def collect(self) -> list[Sampled]:
        return self._results.popleft()()


class Core:
    """A running EngineCore, in a thread of this process."""

    def __init__(self, runner: ScriptedRunner, *, owner_stands_still: bool = False, **grammars: Any) -> None:
        self.connection, inner = Pipe()
        self._doors: socket.socket | None = None
        self._inner_doors: socket.socket | None = None
        if owner_stands_still:
            self._doors, self._inner_doors = socket.socketpair()
            _fill(inner)
        self._grammars = grammars
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(runner, inner), daemon=True)
        self._thread.start()

    def _run(self, runner: ScriptedRunner, connection: Connection) -> None:
        try:
            EngineCore(SETTINGS, runner, Connections(connection, self._inner_doors), **self._grammars).run()
        except Exception as error:
            self.error = error
        finally:
            connection.close()

    def send(self, *commands: ToCore) -> None:
        for command in commands:
            self.connection.send_bytes(msgspec.msgpack.encode(command))

    def connect(self) -> None:
        """From now on as an API server, while the owner says and reads nothing more."""
        assert self._doors is not None
        self.owner = self.connection
        self.connection, theirs = Pipe()
        with theirs, self._doors:
            socket.send_fds(self._doors, [b"+"], [theirs.fileno()])

    def outputs(self) -> Iterator[RequestOutput]:
        """Until the core is gone; fails if it says nothing for long."""
        decoder: msgspec.msgpack.Decoder[FromCore] = msgspec.msgpack.Decoder(FromCore)
        with contextlib.suppress(EOFError):
            while self.connection.poll(30):
                message = decoder.decode(self.connection.recv_bytes())
                assert isinstance(message, StepOutputs)
                yield from message.outputs
            pytest.fail("the core hangs")

    def ends(self, num_requests: int) -> dict[str, RequestOutput]:
        """The last outputs of that many requests, by request."""
        ends: dict[str, RequestOutput] = {}
        for output in self.outputs():
            if output.finish_reason is not None:
                ends[output.request_id] = output
            if len(ends) == num_requests:
                break
        return ends

    def join(self) -> None:
        self._thread.join(30)
        assert not self._thread.is_alive()


def _fill(connection: Connection) -> None:
    """Until there is no room for more, as when the other side has stood still for long."""
    with socket.socket(fileno=os.dup(connection.fileno())) as end, contextlib.suppress(BlockingIOError):
        while True:
            end.send(bytes(1024), socket.MSG_DONTWAIT)


def add(request_id: str, num_prompt_tokens: int = 3, max_tokens: int = 4, grammar: str | None = None) -> AddRequest:
    params = SamplingParams(max_tokens=max_tokens, grammar=grammar)
    return AddRequest(
        request_id=request_id,
        tenant_id="t",
        prompt_token_ids=array("I", range(num_prompt_tokens)).tobytes(),
        sampling_params=params,
        arrival_time=0.0,
    )


@pytest.mark.parametrize(("pipeline_depth", "raises_late"), [(1, False), (1, True), (2, False), (2, True)])
def test_a_step_that_fails_ends_its_own_requests_alone(
    pipeline_depth: int, raises_late: bool, caplog: pytest.LogCaptureFixture
) -> None:
    poisoned_seats: set[int] = set()

    def compute(batch: Batch) -> list[Sampled]:
        poisoned_seats.difference_update(batch.freed_seats)
        poisoned_seats.update(started.seat for started in batch.started if started.request_id == "poison")
        if any(item.seat in poisoned_seats for item in batch.scheduled):
            raise RuntimeError("no memory for this step")
        return sampled(batch)

    core = Core(ScriptedRunner(compute, pipeline_depth=pipeline_depth, raises_late=raises_late))
    with caplog.at_level(logging.ERROR):
        core.send(add("poison"))
        assert core.ends(1)["poison"].finish_reason is FinishReason.ERROR
    core.send(add("after"))
    after = core.ends(1)["after"]
    assert (after.finish_reason, after.num_output_tokens) == (FinishReason.LENGTH, 4)
    assert "no memory for this step" in caplog.text
    core.send(Shutdown())
    core.join()
    assert core.error is None


def test_steps_that_keep_failing_end_the_core() -> None:
    def compute(batch: Batch) -> list[Sampled]:
        raise RuntimeError("the device is lost")

    core = Core(ScriptedRunner(compute))
    for name in "abc":
        core.send(add(name))
        assert core.ends(1)[name].finish_reason is FinishReason.ERROR
    core.join()
    assert str(core.error) == "the device is lost"


@pytest.mark.parametrize("reason", [FinishReason.ERROR, FinishReason.GRAMMAR])
def test_logits_without_a_token_end_their_request_alone(reason: FinishReason) -> None:
    seats: dict[int, str] = {}  # by the request that holds it: who sits where depends on how the commands arrive

    def compute(batch: Batch) -> list[Sampled]:
        seats.update((started.seat, started.request_id) for started in batch.started)
        return [
            Sampled((), failure=reason) if seats[item.seat] == "without" else Sampled((7,))
            for item in batch.scheduled
            if item.num_samples
        ]

    core = Core(ScriptedRunner(compute))
    core.send(*(add(name) for name in ("a", "b", "without", "c")))
    ends = {name: (output.finish_reason, output.num_output_tokens) for name, output in core.ends(4).items()}
    assert ends.pop("without") == (reason, 0)
    assert ends == dict.fromkeys("abc", (FinishReason.LENGTH, 4))
    core.send(Shutdown())
    core.join()


def test_a_command_that_cannot_be_read_ends_the_core() -> None:
    core = Core(ScriptedRunner(sampled))
    core.connection.send_bytes(b"\x81\xa4type\xa7Unknown")
    core.join()
    assert isinstance(core.error, msgspec.MsgspecError)


class PacedCompiler:
    """Compiles when it is told to; "bad" cannot be compiled."""

    def __init__(self) -> None:
        self.asked: queue.SimpleQueue[str] = queue.SimpleQueue()
        self.may_answer = threading.Semaphore(0)

    def compile(self, tenant_id: str, grammar: str) -> Any:
        self.asked.put(grammar)
        assert self.may_answer.acquire(timeout=120)
        if grammar == "bad":
            raise GrammarError(grammar)
        return grammar


class RecordingStructures(Structures):
    """Knows which grammars the runner was told, and forgets them as it should."""

    def __init__(self) -> None:
        super().__init__(8)
        self.added: list[str] = []

    def add(self, request_id: str, compiled: Any) -> None:
        super().add(request_id, compiled)
        self.added.append(request_id)

    @property
    def known(self) -> set[str]:
        return set(self._compiled)


def test_grammars_are_compiled_beside_the_loop() -> None:
    """Others are computed meanwhile; who leaves meanwhile is never computed, and is told its end at once."""
    compiler, structures = PacedCompiler(), RecordingStructures()
    known_at: list[set[str]] = []

    def compute(batch: Batch) -> list[Sampled]:
        known_at.append(structures.known)
        return sampled(batch)

    core = Core(ScriptedRunner(compute), structures=structures, compiler=compiler)
    core.send(add("slow", grammar="good"), add("free"))
    assert compiler.asked.get(timeout=120) == "good"
    assert core.ends(1)["free"].finish_reason is FinishReason.LENGTH
    core.send(add("gone", grammar="good"), AbortRequest(request_id="gone", reason=FinishReason.ABORT))
    assert core.ends(1)["gone"].finish_reason is FinishReason.ABORT
    core.send(add("bad", grammar="bad"))
    for _ in range(3):
        compiler.may_answer.release()
    ends = core.ends(2)
    assert (ends["slow"].finish_reason, ends["bad"].finish_reason) == (FinishReason.LENGTH, FinishReason.ERROR)
    assert structures.added == ["slow"]
    assert known_at[0] == set() and known_at[-1] == {"slow"}
    core.send(Shutdown())
    core.join()
    assert core.error is None and structures.known == set(), "nothing is kept of who has ended"


def test_a_runner_that_knows_no_grammars_gives_no_free_text() -> None:
    core = Core(ScriptedRunner(sampled))
    core.send(add("a", grammar="good"))
    assert core.ends(1)["a"].finish_reason is FinishReason.ERROR
    core.send(Shutdown())
    core.join()


def test_streams_of_others_go_on_while_the_owner_stands_still() -> None:
    core = Core(ScriptedRunner(sampled), owner_stands_still=True)
    core.connect()
    core.send(add("a"), add("b"))
    assert {output.finish_reason for output in core.ends(2).values()} == {FinishReason.LENGTH}
    core.owner.close()
    core.join()
