"""Simulation: one run of a scheduler in virtual time. The scheduler cannot tell it from serving.

The loop is that of the engine core: take what has arrived, `step`, compute, `update`. Only computing is replaced, by
the device's step time, and time itself.
"""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from evenhand_engine.errors import EvenhandError
from evenhand_engine.scheduler.batch import Batch
from evenhand_engine.scheduler.request import Request, RequestOutput, Sampled, SamplingParams
from evenhand_engine.scheduler.step_time import StepShape, shape_of
from evenhand_engine.simulator.device import Device
from evenhand_engine.simulator.measures import RequestRecord
from evenhand_engine.simulator.traces import TraceRequest

STOP_TOKEN_ID = 1
TEXT_TOKEN_ID = 0
FIRST_PROMPT_TOKEN_ID = 2
_STOP, _TEXT = Sampled((STOP_TOKEN_ID,)), Sampled((TEXT_TOKEN_ID,))


class SimulatedScheduler(Protocol):
    """What a simulation drives: the part of `Scheduler` that the engine core uses."""

    def add(self, request: Request, now: float) -> None: ...
    def step(self, now: float) -> Batch | None: ...
    def update(self, sampled: Sequence[Sampled], now: float) -> list[RequestOutput]: ...
    def collect(self) -> list[RequestOutput]: ...


class Door(Protocol):
    """Refuses requests before the scheduler sees them, as quotas do."""

    def admits(self, asked: TraceRequest) -> bool: ...


class StuckError(EvenhandError):
    """The scheduler has work, nothing more will arrive, and it schedules nothing."""


@dataclass(slots=True)
class StepLog:
    """The steps of a run: when each began, how long it took and what it computed."""

    starts: "array[float]" = field(default_factory=lambda: array("d"))
    seconds: "array[float]" = field(default_factory=lambda: array("d"))
    shapes: list[StepShape] = field(default_factory=list)

    def append(self, start: float, seconds: float, shape: StepShape) -> None:
        self.starts.append(start)
        self.seconds.append(seconds)
        self.shapes.append(shape)


@dataclass(frozen=True, slots=True)
class Run:
    """What came of a simulation: one record for each request that arrived, in order of arrival."""

    records: list[RequestRecord]
    steps: StepLog
    end_time: float


@dataclass(slots=True)
class _Progress:
    asked: TraceRequest
    request: Request
    token_times: "array[float]" = field(default_factory=lambda: array("d"))
    is_finished: bool = False
    num_cached_tokens: int = 0


class Simulation:
    """Runs `trace` through `scheduler` on `device`.

    With `lengths_known` a request's `max_tokens` is its true output length, as the published baselines need it;
    otherwise it is `max_model_len` less the prompt, and a stop token ends it, so that nothing can be foreseen.
    """

    def __init__(
        self,
        scheduler: SimulatedScheduler,
        device: Device,
        trace: Sequence[TraceRequest],
        *,
        max_model_len: int,
        lengths_known: bool = False,
        door: Door | None = None,
    ) -> None:
        self._scheduler = scheduler
        self._device = device
        self._trace = sorted(trace, key=lambda request: request.arrival_time)
        self._max_model_len = max_model_len
        self._lengths_known = lengths_known
        self._door = door
        self._progress: dict[str, _Progress] = {}
        self._num_tokens: dict[str, int] = {}  # of prompt and output, by request id
        self._seats: dict[int, int] = {}  # the same of the request in each seat
        self._num_unfinished = 0
        self._prefixes: dict[str, list[int]] = {}
        self._next_prompt_token_id = FIRST_PROMPT_TOKEN_ID

    def run(self, until: float = float("inf")) -> Run:
        """Simulate until every request has ended, or until the time `until`.

        Raises:
            StuckError: requests wait, nothing runs, and nothing will arrive.
        """
        steps = StepLog()
        now, num_added = 0.0, 0
        while now < until and (num_added < len(self._trace) or self._num_unfinished):
            num_added = self._add_arrivals(num_added, now)
            batch = self._scheduler.step(now)
            if batch is None:
                self._deliver(self._scheduler.collect(), now)
                now = self._next_arrival(num_added, now)
                continue
            shape = shape_of(batch)
            seconds = self._device.seconds(shape)
            steps.append(now, seconds, shape)
            now += seconds
            self._deliver(self._scheduler.update(self._sample(batch), now), now)
        return Run([self._record(i) for i in range(num_added)], steps, now)

    def _add_arrivals(self, num_added: int, now: float) -> int:
        while num_added < len(self._trace) and self._trace[num_added].arrival_time <= now:
            asked = self._trace[num_added]
            if self._door is None or self._door.admits(asked):
                request = self._request(f"{num_added}", asked)
                self._progress[request.request_id] = _Progress(asked, request)
                self._num_tokens[request.request_id] = asked.num_prompt_tokens + asked.num_output_tokens
                self._num_unfinished += 1
                self._scheduler.add(request, now)
            num_added += 1
        return num_added

    def _next_arrival(self, num_added: int, now: float) -> float:
        if num_added < len(self._trace):
            return max(now, self._trace[num_added].arrival_time)
        if self._num_unfinished:
            raise StuckError(f"at {now:.3f} s {self._num_unfinished} requests wait and the scheduler schedules none")
        return now

    def _request(self, request_id: str, asked: TraceRequest) -> Request:
        room = self._max_model_len - asked.num_prompt_tokens
        max_tokens = asked.num_output_tokens if self._lengths_known else max(room, asked.num_output_tokens)
        return Request(
            request_id,
            asked.tenant_id,
            self._prompt(asked),
            SamplingParams(max_tokens=max_tokens, stop_token_ids=frozenset({STOP_TOKEN_ID})),
            asked.arrival_time,
            user=asked.user,
            cache_salt=asked.tenant_id,
        )

    def _prompt(self, asked: TraceRequest) -> list[int]:
        """Token ids that no other prompt has, but for its prefix."""
        num_own = asked.num_prompt_tokens
        prefix: list[int] = []
        if asked.prefix:
            known = self._prefixes.setdefault(asked.prefix, [])
            known += self._fresh_tokens(max(0, asked.num_prefix_tokens - len(known)))
            prefix = known[: min(asked.num_prefix_tokens, num_own)]
        return prefix + self._fresh_tokens(num_own - len(prefix))

    def _fresh_tokens(self, num_tokens: int) -> list[int]:
        start = self._next_prompt_token_id
        self._next_prompt_token_id += num_tokens
        return list(range(start, start + num_tokens))

    def _sample(self, batch: Batch) -> list[Sampled]:
        for started in batch.started:
            self._seats[started.seat] = self._num_tokens[started.request_id]
        return [
            _STOP if item.num_computed_tokens + item.num_scheduled_tokens + 1 >= self._seats[item.seat] else _TEXT
            for item in batch.scheduled
            if item.num_samples
        ]

    def _deliver(self, outputs: Sequence[RequestOutput], now: float) -> None:
        for output in outputs:
            progress = self._progress[output.request_id]
            if output.token_ids:  # one: a step gives a request no more
                progress.token_times.append(now)
            if output.finish_reason is not None:
                assert not progress.is_finished, f"request {output.request_id} finished twice"
                progress.is_finished = True
                progress.num_cached_tokens = output.num_cached_tokens
                self._num_unfinished -= 1
                del progress.request.token_ids[:]  # a million of them would fill the memory

    def _record(self, index: int) -> RequestRecord:
        asked = self._trace[index]
        progress = self._progress.get(f"{index}")
        times = progress.token_times if progress is not None else array("d")
        is_complete = progress is not None and progress.is_finished and len(times) == asked.num_output_tokens
        return RequestRecord(
            tenant_id=asked.tenant_id,
            arrival_time=asked.arrival_time,
            num_prompt_tokens=asked.num_prompt_tokens,
            num_output_tokens=asked.num_output_tokens,
            first_token_time=times[0] if times else None,
            finish_time=times[-1] if is_complete else None,
            token_times=np.frombuffer(times) if times else None,
            num_preemptions=progress.request.num_preemptions if progress else 0,
            num_cached_tokens=progress.num_cached_tokens if progress else 0,
        )
