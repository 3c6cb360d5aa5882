"""Inbox: what the thread that reads the core's pipe has for the event loop, bounded however late the loop is.

One wake-up is pending at most. What comes before the loop has taken the last message is merged into it: outputs of one request
become one output, so that what waits grows by the tokens of the requests in flight and by nothing else.
"""

import threading
from typing import NamedTuple

import msgspec

from evenhand_engine.messages import EngineStats, FromCore, StepOutputs
from evenhand_engine.scheduler.request import RequestOutput, TokenLogprobs


class Arrival(NamedTuple):
    """A message, and the `time.monotonic()` at which the last part of it came."""

    message: FromCore
    now: float


class Inbox:
    """Between one thread that puts and one that takes."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._arrivals: list[Arrival] = []
        self._late = _LateOutputs()  # what came after the last arrival, if that is outputs of a step

    def put(self, message: FromCore, now: float) -> bool:
        """Add a message; returns whether the taker must be woken, since nothing was waiting for it."""
        with self._lock:
            if (
                isinstance(message, StepOutputs)
                and self._arrivals
                and isinstance(self._arrivals[-1].message, StepOutputs)
            ):
                self._late.add(message, now)
                return False
            is_first = not self._arrivals
            self._flush()
            self._arrivals.append(Arrival(message, now))
            return is_first

    def take(self) -> list[Arrival]:
        """All that has come, in order."""
        with self._lock:
            self._flush()
            arrivals, self._arrivals = self._arrivals, []
            return arrivals

    def _flush(self) -> None:
        if not self._late.is_empty:
            self._arrivals += self._late.arrivals()
            self._late = _LateOutputs()


class _LateOutputs:
    """Outputs of several steps as those of one."""

    def __init__(self) -> None:
        self._outputs: dict[str, _MergedOutput] = {}
        self._stats: list[EngineStats] = []  # ten a second at most
        self._now = 0.0

    @property
    def is_empty(self) -> bool:
        return not (self._outputs or self._stats)

    def add(self, message: StepOutputs, now: float) -> None:
        self._now = now
        for output in message.outputs:
            if (merged := self._outputs.get(output.request_id)) is None:
                self._outputs[output.request_id] = _MergedOutput(output)
            else:
                merged.add(output)
        if message.stats is not None:
            self._stats.append(message.stats)

    def arrivals(self) -> list[Arrival]:
        outputs = tuple(merged.output() for merged in self._outputs.values())
        first = self._stats[0] if self._stats else None
        others = (StepOutputs(outputs=(), stats=stats) for stats in self._stats[1:])
        return [Arrival(message, self._now) for message in (StepOutputs(outputs=outputs, stats=first), *others)]


class _MergedOutput:
    """Outputs of one request, one after the other."""

    __slots__ = ("_last", "_logprobs", "_num_cached_tokens", "_prompt_logprobs", "_token_ids")

    def __init__(self, first: RequestOutput) -> None:
        self._last = first
        self._token_ids = list[int](first.token_ids)
        self._logprobs = list[TokenLogprobs](first.logprobs)
        self._prompt_logprobs = first.prompt_logprobs
        self._num_cached_tokens = first.num_cached_tokens

    def add(self, output: RequestOutput) -> None:
        if self._last.finish_reason is not None:
            return  # nothing counts after the end
        self._last = output
        self._token_ids += output.token_ids
        self._logprobs += output.logprobs
        self._prompt_logprobs = self._prompt_logprobs or output.prompt_logprobs
        self._num_cached_tokens = max(self._num_cached_tokens, output.num_cached_tokens)

    def output(self) -> RequestOutput:
        return msgspec.structs.replace(
            self._last,
            token_ids=tuple(self._token_ids),
            logprobs=tuple(self._logprobs),
            prompt_logprobs=self._prompt_logprobs,
            num_cached_tokens=self._num_cached_tokens,
        )
