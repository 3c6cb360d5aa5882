"""Upstream: an engine that somebody else wrote, and the queue before it.

Lives in the HTTP process that owns what tenants share, on its event loop. Owns the dispatcher and who waits for it. A request is
queued here, sent by whoever asked, in whichever process that is, and what comes back is told; the dispatcher decides nothing by
itself, so every event ends with `pump`. The upstream may be down, or restart, at any time: that is news for a probe, never an end
of ours.
"""

import asyncio
import contextlib
import time
from collections.abc import Callable

import aiohttp

from evenhand_engine.backends.backend import ModelInfo
from evenhand_engine.backends.upstream_connection import UpstreamConnection
from evenhand_engine.backends.upstream_metrics import backend_name, read_gauges, read_slots
from evenhand_engine.core.stats import StatsRecorder
from evenhand_engine.dispatch.dispatcher import Dispatcher, Errand
from evenhand_engine.messages import EngineStats
from evenhand_engine.scheduler.request import FinishReason
from evenhand_policy.config import SchedulerConfig

Called = Callable[[FinishReason | None], None]

_PROBE_SECONDS = 1.0
_PROBE_TIMEOUT = aiohttp.ClientTimeout(total=2.0)
_PROBES_PER_SIZING = 30
_STATS_SECONDS = 0.1
_MAX_METRICS_BYTES = 4 * 2**20


class Upstream:
    """An `Enforcer` whose engine is another server.

    Attributes:
        connection: of this process, for probes at least.
        dispatcher: who is sent next.
        problem: why the upstream cannot be used now, by the last probe; None: it can.
        metrics_text: its `/metrics` as last scraped.
        recognised: called with which engine it is, whenever it turns out to be another.
    """

    def __init__(self, connection: UpstreamConnection, dispatcher: Dispatcher) -> None:
        self.connection = connection
        self.settings = settings = connection.settings
        self.dispatcher = dispatcher
        self.problem: str | None = "the upstream was not reached yet"
        self.metrics_text = b""
        self.recognised: list[Callable[[str], None]] = []
        self.stats: EngineStats | None = None
        self.died = asyncio.Event()  # never set: the upstream may come back
        self._loop = asyncio.get_running_loop()
        self._waiting: dict[str, Called] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._recorder = StatsRecorder(dispatcher)
        self._listeners: list[Callable[[EngineStats], None]] = []
        self._kv_tokens = settings.kv_tokens
        dispatcher.window.resize_kv(settings.kv_tokens)
        dispatcher.window.num_seats = settings.max_num_seqs or float("inf")
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Begin to probe the upstream and to tell the state."""
        self._tasks = [asyncio.create_task(self._probe()), asyncio.create_task(self._report())]

    # -- turns

    def queue(self, errand: Errand, called: Called) -> None:
        """Have `called` once, perhaps at once: with None when the request is to be sent, else with why it never will be. Whoever
        queues it must `end` it."""
        self._waiting[errand.request_id] = called
        self.dispatcher.add(errand, time.monotonic())
        self.pump()

    def end(self, *errands: Errand) -> None:
        """Queued, sent or ended, they are no more; what they were charged stands."""
        for errand in errands:
            self._waiting.pop(errand.request_id, None)
            self.dispatcher.end(errand, FinishReason.ABORT)
        self.pump()

    def pump(self) -> None:
        """Send whoever may be sent now, and tell whoever may not be at all."""
        for errand in self.dispatcher.dispatch(time.monotonic()):
            self._call(errand.request_id, None)
        for request_id, reason in self.dispatcher.refused():
            self._call(request_id, reason)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if (due := self.dispatcher.next_event) != float("inf"):
            self._timer = self._loop.call_later(max(0.0, due - time.monotonic()) + 1e-3, self.pump)

    def _call(self, request_id: str, reason: FinishReason | None) -> None:
        if (called := self._waiting.pop(request_id, None)) is not None:
            called(reason)

    # -- backend.Enforcer

    @property
    def failure(self) -> str | None:
        return None

    @property
    def info(self) -> ModelInfo:
        return ModelInfo(model_name="upstream", max_model_len=self.settings.max_model_len)

    @property
    def num_in_flight(self) -> int:
        return self.dispatcher.window.num_in_flight

    def reconfigure(self, config: SchedulerConfig, num_replicas: int = 1) -> None:
        self.dispatcher.reconfigure(config, num_replicas=num_replicas)
        self.pump()

    def on_stats(self, listener: Callable[[EngineStats], None]) -> None:
        self._listeners.append(listener)

    def seconds_without_progress(self, now: float) -> float:
        return 0.0

    async def close(self, timeout: float = 5.0) -> None:
        """Cut every connection to the upstream; what is in flight ends."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._timer is not None:
            self._timer.cancel()
        await self.connection.close()

    # -- what the upstream says of itself

    async def _probe(self) -> None:
        count = 0
        while True:
            was_well, self.problem = self.problem is None, await self._check_health()
            if self.problem is None:
                if not was_well or count % _PROBES_PER_SIZING == 0:  # it may be another process than before
                    await self._ask_slots()
                await self._scrape()
            count += 1
            await asyncio.sleep(_PROBE_SECONDS)

    async def _check_health(self) -> str | None:
        try:
            async with self._get("/health") as response:
                self._recognise(backend_name(response.headers.get("Server", ""), self.metrics_text))
                if response.status >= 500:
                    return f"the upstream answers {response.status} to /health"
                return None
        except (aiohttp.ClientError, OSError, TimeoutError, ValueError):
            return "the upstream does not answer"

    def _recognise(self, backend: str) -> None:
        if backend != self.connection.backend:
            self.connection.backend = backend
            for listener in self.recognised:
                listener(backend)

    async def _ask_slots(self) -> None:
        if self.settings.max_num_seqs is not None:
            return
        with contextlib.suppress(aiohttp.ClientError, OSError, TimeoutError, ValueError):
            async with self._get("/props") as response:
                slots = read_slots(await _read(response) or b"") if response.status == 200 else None
            self.dispatcher.window.num_seats = float("inf") if slots is None else slots
            self.pump()

    async def _scrape(self) -> None:
        with contextlib.suppress(aiohttp.ClientError, OSError, TimeoutError, ValueError):
            async with self._get("/metrics") as response:
                text = await _read(response) if response.status == 200 else None
            if text is None:
                return
            gauges, kv_tokens = read_gauges(text.decode(errors="replace"))
            self.metrics_text = text
            if self.settings.kv_tokens is None and kv_tokens is not None and kv_tokens != self._kv_tokens:
                self._kv_tokens = kv_tokens
                self.dispatcher.window.resize_kv(kv_tokens)
            self.dispatcher.correct(gauges, time.monotonic())
            self.pump()

    def _get(self, path: str) -> "aiohttp.client._RequestContextManager":
        connection = self.connection
        return connection.session.get(
            connection.url(path), timeout=_PROBE_TIMEOUT, headers=connection.authorization, allow_redirects=False
        )

    async def _report(self) -> None:
        while True:
            await asyncio.sleep(_STATS_SECONDS)
            stats = self._recorder.snapshot(time.monotonic(), is_idle=True)
            if stats is not None:
                self.stats = stats
                for listener in self._listeners:
                    listener(stats)


async def _read(response: aiohttp.ClientResponse) -> bytes | None:
    """The answer; None if it is larger than any of use."""
    text = b""
    async for chunk in response.content.iter_any():
        text += chunk
        if len(text) > _MAX_METRICS_BYTES:
            return None
    return text
