"""The engine core: one process, one loop, one thread that decides; it alone touches scheduler and runner.

    HTTP side ──commands──▶ receiver threads ──▶ queue ──▶ EngineCore.run ──StepOutputs──▶ HTTP side

The receivers (`connections`) only drain the pipes, so that the HTTP side never blocks on a core that is busy computing.
"""

import contextlib
import gc
import logging
import os
import queue
import signal
import socket
import time
from array import array
from collections import deque
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, NamedTuple, NoReturn

from evenhand_engine.config import EngineConfig, SchedulerSettings
from evenhand_engine.core.compile_queue import Compiled, CompileQueue
from evenhand_engine.core.connections import Connections, send
from evenhand_engine.core.stats import StatsRecorder
from evenhand_engine.core.step_recorder import StepRecorder, load_token_budgets
from evenhand_engine.core.workers import describe
from evenhand_engine.errors import StartupError
from evenhand_engine.messages import (
    AbortRequest,
    AddRequest,
    EngineFailed,
    EngineReady,
    EngineStats,
    FromCore,
    Reconfigure,
    Shutdown,
    StartupFailed,
    StartupProgress,
    ToCore,
)
from evenhand_engine.model.progress import listening
from evenhand_engine.scheduler.batch import Batch, Runner
from evenhand_engine.scheduler.request import FinishReason, Request, RequestOutput, Sampled
from evenhand_engine.scheduler.scheduler import Scheduler
from evenhand_engine.structured.compiler import Compiler
from evenhand_engine.text.tokenizer import Tokenizer
from evenhand_policy.config import SchedulerConfig

if TYPE_CHECKING:
    from evenhand_engine.core.structures import Structures

logger = logging.getLogger(__name__)

_COMMAND_SECONDS = 0.005  # of each step for commands: what comes in a flood is taken in over several steps
_REST_SECONDS = 60.0  # between two idle moments in which the books are checked and garbage is collected
_MAX_FAILED_STEPS = 3  # in a row, before it is the engine that is broken and not a request
_IDLE_WAIT_SECONDS = 0.05  # while requests wait but nothing can be computed: queue timeouts need the clock


def run_core(config: EngineConfig, connection: Connection, doors: socket.socket | None = None) -> None:
    """Entry point of the engine core process: load the model, say so, serve until told to stop or the pipe closes.

    `doors` brings more pipes, of API servers: see `Connections`.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole process group; the HTTP side decides
    gc.disable()  # nothing of a start is garbage, nor is a request: a look at 60,000 that are queued takes 200 ms: see _rest

    def lose(message: str) -> NoReturn:
        """Any thread, whatever the loop waits for."""
        with contextlib.suppress(OSError):
            send(connection, EngineFailed(message=message))
        os._exit(1)

    try:
        from evenhand_engine.core.loading import load_model  # imports torch: only this process pays for it

        gc.freeze()  # what modules hold stays: a search for garbage among it would take 100 ms of the start
        token_budgets = load_token_budgets(config.replay_steps) if config.replay_steps else None
        with listening(lambda stage: _tell(connection, StartupProgress(stage=stage))):
            model = load_model(config, lose)
        recorder = StepRecorder(config.record_steps) if config.record_steps else None
    except StartupError as error:
        _tell(connection, StartupFailed(message=str(error)))
        return
    gc.collect()
    gc.freeze()
    try:
        ready = EngineReady(
            model_name=model.model_name,
            max_model_len=model.settings.max_model_len,
            num_kv_blocks=model.settings.num_kv_blocks,
            block_size=model.settings.block_size,
            dtype=model.dtype,
            device=model.device,
            knows_grammars=model.structures is not None,
            scores_prompts=model.scores_prompts,
        )
        connections = Connections(connection, doors, ready)
        compiler = Compiler(lambda: Tokenizer(model.directory))
        if model.structures is not None:
            compiler.prepare_aside()
        with recorder or contextlib.nullcontext():
            EngineCore(
                model.settings,
                model.runner,
                connections,
                structures=model.structures,
                compiler=compiler,
                token_budgets=token_budgets,
                recorder=recorder,
            ).run()
    except (BrokenPipeError, ConnectionResetError):
        logger.info("the HTTP process is gone; the engine core ends")
    except Exception as error:
        logger.exception("the engine core failed")
        send(connection, EngineFailed(message=describe(error)))
        raise SystemExit(1) from error


def _tell(connection: Connection, message: FromCore) -> None:
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the HTTP process did not wait
        send(connection, message)


class _Submitted(NamedTuple):
    batch: Batch
    error: Exception | None  # why it could not be submitted


class EngineCore:
    """The actor: drain commands, plan a step, run it, publish what came of it."""

    def __init__(
        self,
        settings: SchedulerSettings,
        runner: Runner,
        connections: Connections,
        *,
        structures: "Structures | None" = None,
        compiler: Compiler | None = None,
        token_budgets: Iterator[int] | None = None,
        recorder: StepRecorder | None = None,
    ) -> None:
        """`structures`: of the runner; None, or no `compiler`: requests with a grammar end with an error. `token_budgets`:
        budgets of the steps to come, without end (a replay). `recorder` is told of every finished step."""
        self._scheduler = Scheduler(settings, SchedulerConfig(), token_budgets=token_budgets)
        self._recorder = recorder
        self._runner = runner
        self._connections = connections
        self._commands = connections.commands
        self._structures = structures
        self._compiling = None if compiler is None else CompileQueue(compiler, self._commands.put)
        self._stats = StatsRecorder(self._scheduler, self._scheduler.speculation)
        self._in_flight: deque[_Submitted] = deque()
        self._num_failed_steps = 0  # in a row
        self._step_ended_at = 0.0
        self._rested_at = 0.0
        self._is_stuck = True  # nothing can be computed before something comes in, or a queue timeout passes
        self._is_stopping = False

    def run(self) -> None:
        """Serve until Shutdown or until the other side is gone.

        Raises what the scheduler raises, what the runner raises several steps in a row, and what makes a command
        unreadable.
        """
        self._connections.start()
        while True:
            self._execute_commands()
            if self._is_stopping:
                return
            self._advance()

    def _execute_commands(self) -> None:
        """Execute what came in, as far as a step has time for it; wait for a command when there is nothing else to do.

        Raises:
            AssertionError: the scheduler's books are wrong; seen in an idle moment, when a restart loses nothing.
        """
        if self._is_stuck:
            self._rest()
            timeout = _IDLE_WAIT_SECONDS if self._scheduler.request_table.requests else None
            with contextlib.suppress(queue.Empty):
                self._execute(self._commands.get(timeout=timeout))
        until = time.monotonic() + _COMMAND_SECONDS
        while not self._commands.empty() and time.monotonic() < until:
            self._execute(self._commands.get())

    def _rest(self) -> None:
        """In an idle moment, now and then: what takes too long between two steps."""
        now = time.monotonic()
        if not self._scheduler.request_table.requests and now >= self._rested_at + _REST_SECONDS:
            self._rested_at = now
            self._scheduler.request_table.check_integrity()
            gc.collect()

    def _execute(self, command: ToCore | Compiled | Exception) -> None:
        match command:
            case Exception():
                raise command
            case AddRequest() if command.sampling_params.grammar is not None:
                if self._structures is None or self._compiling is None:
                    self._end_before_its_beginning(command.request_id, FinishReason.ERROR)
                else:
                    self._compiling.submit(command)
            case Compiled():
                self._add_compiled(command)
            case AddRequest():
                self._add(command)
            case AbortRequest():
                if self._compiling is not None and self._compiling.take(command.request_id):
                    self._end_before_its_beginning(command.request_id, command.reason)
                else:
                    self._scheduler.abort(command.request_id, command.reason, command.num_output_tokens)
            case Reconfigure():
                self._scheduler.reconfigure(command.config, num_replicas=command.num_replicas)
            case Shutdown():
                self._is_stopping = True

    def _add(self, command: AddRequest) -> None:
        request = Request(
            command.request_id,
            command.tenant_id,
            array("I", command.prompt_token_ids),
            command.sampling_params,
            command.arrival_time,
            user=command.user,
            priority=command.priority,
        )
        self._scheduler.add(request, time.monotonic())

    def _add_compiled(self, compiled: Compiled) -> None:
        """Its request waits from now on, if it is still wanted."""
        command, matcher = compiled
        if self._compiling is None or self._structures is None or not self._compiling.take(command.request_id):
            return
        if matcher is None:
            self._end_before_its_beginning(command.request_id, FinishReason.ERROR)
        else:
            self._structures.add(command.request_id, matcher)
            self._add(command)

    def _end_before_its_beginning(self, request_id: str, reason: FinishReason) -> None:
        """The scheduler has never heard of it."""
        self._publish([RequestOutput(request_id=request_id, finish_reason=reason)])

    def _advance(self) -> None:
        """Submit one batch; take in the oldest when the pipeline is full or there is nothing to submit."""
        started_at = time.monotonic()
        batch = self._scheduler.step(started_at)
        self._publish(self._scheduler.collect())  # first starts and refusals need not wait for the batch
        if batch is not None:
            self._in_flight.append(_Submitted(batch, self._submit(batch)))
        if self._in_flight and (batch is None or len(self._in_flight) >= self._runner.pipeline_depth):
            oldest, error = self._in_flight.popleft()
            sampled = self._collect() if error is None else error
            now = time.monotonic()
            seconds = now - max(started_at, self._step_ended_at)
            self._step_ended_at = now
            if isinstance(sampled, Exception):
                self._publish(self._scheduler.fail(now))
                self._count_failure(sampled)
            else:
                self._publish(self._scheduler.update(sampled, now))
                self._num_failed_steps = 0
                self._stats.record_step(oldest.num_tokens, seconds)
                if self._recorder is not None:
                    self._recorder.record(oldest, seconds)
        self._is_stuck = batch is None and not self._in_flight
        if self._connections.owner_reads:
            self._publish([], self._stats.snapshot(time.monotonic(), is_idle=self._is_stuck))

    def _submit(self, batch: Batch) -> Exception | None:
        try:
            self._runner.submit(batch)
        except Exception as error:
            return error
        return None

    def _collect(self) -> list[Sampled] | Exception:
        try:
            return self._runner.collect()
        except Exception as error:
            return error

    def _count_failure(self, error: Exception) -> None:
        """Raises it if steps keep failing: then no request is to blame."""
        self._num_failed_steps += 1
        if self._num_failed_steps >= _MAX_FAILED_STEPS:
            raise error
        logger.error("a step failed, and its requests with it", exc_info=error)

    def _publish(self, outputs: list[RequestOutput], stats: EngineStats | None = None) -> None:
        if self._structures is not None:
            for output in outputs:
                if output.finish_reason is not None:
                    self._structures.forget(output.request_id)
        self._connections.publish(outputs, stats)
