"""The core's pipes to several processes: each gets its own outputs, and one that is gone or deaf troubles nobody."""

import contextlib
import socket
from array import array
from collections.abc import Iterator
from multiprocessing import Pipe
from multiprocessing.connection import Connection

import msgspec
import pytest

from evenhand_engine.config import SchedulerSettings
from evenhand_engine.core import connections as connections_module
from evenhand_engine.core.connections import Connections
from evenhand_engine.core.stats import StatsRecorder
from evenhand_engine.messages import (
    AbortRequest,
    AddRequest,
    EngineFailed,
    FromCore,
    Reconfigure,
    Shutdown,
    StepOutputs,
    ToCore,
)
from evenhand_engine.scheduler.request import FinishReason, RequestOutput, SamplingParams
from evenhand_engine.scheduler.scheduler import Scheduler
from evenhand_policy.config import SchedulerConfig

WAIT_SECONDS = 120.0
GREETING = EngineFailed(message="hello")


class Pipes:
    """Connections, and the other ends."""

    def __init__(self) -> None:
        self.owner, inner = Pipe()
        self._doors, their_doors = socket.socketpair()
        self.core = Connections(inner, their_doors, GREETING)
        self.core.start()
        assert receive(self.owner) == GREETING

    def connect(self) -> Connection:
        ours, theirs = Pipe()
        with theirs:
            socket.send_fds(self._doors, [b"+"], [theirs.fileno()])
        assert receive(ours) == GREETING
        return ours

    def command(self) -> ToCore:
        command = self.core.commands.get(timeout=WAIT_SECONDS)
        assert not isinstance(command, Exception)
        return command

    def add(self, connection: Connection, request_id: str) -> None:
        send(connection, add(request_id))
        assert self.command() == add(request_id)

    def close(self) -> None:
        send(self.owner, Shutdown())
        while not isinstance(self.command(), Shutdown):
            pass
        self._doors.close()


@pytest.fixture
def pipes() -> Iterator[Pipes]:
    made = Pipes()
    yield made
    made.close()


def add(request_id: str) -> AddRequest:
    return AddRequest(
        request_id=request_id,
        tenant_id="t",
        prompt_token_ids=array("I", [1]).tobytes(),
        sampling_params=SamplingParams(max_tokens=4),
        arrival_time=0.0,
    )


def send(connection: Connection, message: ToCore) -> None:
    connection.send_bytes(msgspec.msgpack.encode(message))


def receive(connection: Connection) -> FromCore:
    assert connection.poll(WAIT_SECONDS)
    message: FromCore = msgspec.msgpack.decode(connection.recv_bytes(), type=FromCore)
    return message


def outputs(connection: Connection) -> list[str]:
    message = receive(connection)
    assert isinstance(message, StepOutputs)
    return [output.request_id for output in message.outputs]


def output(request_id: str, finish: FinishReason | None = None) -> RequestOutput:
    return RequestOutput(request_id=request_id, token_ids=(1,), finish_reason=finish)


def test_outputs_go_to_where_their_requests_came_from(pipes: Pipes) -> None:
    first, second = pipes.connect(), pipes.connect()
    for connection, name in ((first, "a"), (second, "b"), (first, "c"), (pipes.owner, "o")):
        pipes.add(connection, name)
    pipes.core.publish([output(name) for name in "abco"])
    assert [outputs(connection) for connection in (first, second, pipes.owner)] == [["a", "c"], ["b"], ["o"]]
    pipes.core.publish([output("c", FinishReason.LENGTH), output("b")])
    assert [outputs(connection) for connection in (first, second)] == [["c"], ["b"]]
    assert not pipes.owner.poll(0)


def test_one_that_is_gone_has_its_requests_aborted_and_the_others_go_on(pipes: Pipes) -> None:
    first, second = pipes.connect(), pipes.connect()
    for connection, name in ((first, "a"), (first, "b"), (second, "c")):
        pipes.add(connection, name)
    pipes.core.publish([output("b", FinishReason.LENGTH)])
    first.close()
    assert pipes.command() == AbortRequest(request_id="a", reason=FinishReason.ABORT)
    pipes.add(second, "d")  # so "b", which had ended, is not aborted
    pipes.core.publish([output("a", FinishReason.ABORT), output("c")])
    assert outputs(second) == ["c"]


def test_one_that_says_so_ends_itself_alone(pipes: Pipes) -> None:
    first, second = pipes.connect(), pipes.connect()
    send(first, Shutdown())
    assert first.poll(WAIT_SECONDS)
    with pytest.raises(EOFError):
        first.recv_bytes()
    pipes.add(second, "b")


@pytest.mark.parametrize("message", [b"\xc1", msgspec.msgpack.encode(Reconfigure(config=SchedulerConfig()))])
def test_what_only_the_owner_may_say_ends_the_connection(
    pipes: Pipes, message: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    first = pipes.connect()
    pipes.add(first, "a")
    first.send_bytes(message)
    assert pipes.command() == AbortRequest(request_id="a", reason=FinishReason.ABORT)
    assert "unreadable" in caplog.text


def test_one_that_does_not_read_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections_module, "_SEND_SECONDS", 0.05)
    with contextlib.closing(Pipes()) as pipes:
        deaf, other = pipes.connect(), pipes.connect()
        pipes.add(deaf, "a")
        pipes.add(other, "b")
        many = RequestOutput(request_id="a", token_ids=tuple(range(100_000)))
        for _ in range(10):
            pipes.core.publish([many])
        assert pipes.command() == AbortRequest(request_id="a", reason=FinishReason.ABORT)
        pipes.core.publish([output("a"), output("b")])
        assert outputs(other) == ["b"]


def test_an_owner_who_stands_still_keeps_nobody_waiting(pipes: Pipes) -> None:
    """What is said of the engine waits for him, and streams go on."""
    first = pipes.connect()
    pipes.add(first, "a")
    assert pipes.core.owner_reads
    stats, num_told = StatsRecorder(Scheduler(SchedulerSettings(), SchedulerConfig())).snapshot(0.0, is_idle=True), 0
    while pipes.core.owner_reads:
        assert num_told < 10_000, "his pipe is never full"
        pipes.core.publish([], stats)
        num_told += 1
    pipes.core.publish([output("a")])
    assert outputs(first) == ["a"]
    for _ in range(num_told):
        receive(pipes.owner)
    assert pipes.core.owner_reads


def test_an_owner_who_leaves_a_message_unread_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    """One too large to wait in the pipe; who has streams of his own may take his time."""
    monkeypatch.setattr(connections_module, "_SEND_SECONDS", 0.05)
    with contextlib.closing(Pipes()) as pipes:
        pipes.connect()
        with pytest.raises(BrokenPipeError):
            pipes.core.publish([RequestOutput(request_id="o", token_ids=tuple(range(200_000)))])
        pipes.owner.close()
        pipes.owner, _ = Pipe()
