"""SidecarInFront: the sidecar's own dispatcher before a simulated engine that knows no tenants.

The upstream is the engine's scheduler under `fcfs`. What is sent reaches it only some time after the arrival or the first
chunk that let it go, as over a real socket, so that it begins its next step without it. A simulation hears of all that happened
during a step at its end; the dispatcher is told of each at its own time, in that order. Faults are part of the run: gauges
that come late or freeze, sizes that are wrong, a restart that loses all that is in flight.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from operator import itemgetter

from evenhand_engine.config import SchedulerSettings, SchedulingPolicy
from evenhand_engine.dispatch.dispatcher import Dispatcher, DispatchSettings, Errand
from evenhand_engine.dispatch.gauges import Gauges
from evenhand_engine.dispatch.window import Window
from evenhand_engine.scheduler.batch import Batch, BatchPlan
from evenhand_engine.scheduler.pace import StepBudget
from evenhand_engine.scheduler.request import FinishReason, Request, RequestOutput, Sampled
from evenhand_engine.scheduler.scheduler import Scheduler
from evenhand_engine.scheduler.tenant import Tenant
from evenhand_policy.config import SchedulerConfig

_SCRAPE_SECONDS = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SidecarFaults:
    """What is wrong around a simulated sidecar.

    Attributes:
        hop_seconds: from a first chunk upstream to the arrival of the request that it made room for.
        gauge_delay: age of the gauges when they are read, in seconds.
        gauges_freeze_at: when they stop changing; infinite: never.
        kv_scale: what the upstream says of its cache, as a multiple of the truth; None: it does not say.
        prompt_scale: estimate of a prompt's tokens as a multiple of the truth.
        restart_at: when the upstream loses everything in flight; infinite: never.
        is_silent: answers come as a whole.
        long_prefill_tokens: most tokens of one prompt in a step of the upstream, so that others have the rest of it (vLLM's
            `--long-prefill-token-threshold`); None: whoever is first may take all.
    """

    hop_seconds: float = 0.002
    gauge_delay: float = 0.0
    gauges_freeze_at: float = float("inf")
    kv_scale: float | None = 1.0
    prompt_scale: float = 1.0
    restart_at: float = float("inf")
    is_silent: bool = False
    long_prefill_tokens: int | None = None


class _Upstream(Scheduler):
    """First come, first served, where no prompt takes more than so much of a step."""

    def __init__(self, settings: SchedulerSettings, most: int | None) -> None:
        super().__init__(replace(settings, scheduling_policy=SchedulingPolicy.FCFS), SchedulerConfig())
        self._most = settings.max_num_batched_tokens if most is None else most

    def step(self, now: float) -> Batch | None:
        batch = super().step(now)
        for tenant in self.request_table.running_tenants.values():
            tenant.paused = {}
        return batch

    def _schedule_chunk(
        self, tenant: Tenant, request: Request, num_tokens: int, budget: StepBudget, plan: BatchPlan
    ) -> list[bytes]:
        expected = super()._schedule_chunk(tenant, request, min(num_tokens, self._most), budget, plan)
        if num_tokens > self._most:
            tenant.paused[request.request_id] = request  # it has had its part of this step
        return expected


class SidecarInFront:
    """A `SimulatedScheduler`: dispatcher, wire and upstream.

    Attributes:
        dispatcher: the very code that serves.
        upstream: the engine behind it.
    """

    def __init__(
        self, settings: SchedulerSettings, config: SchedulerConfig, faults: SidecarFaults = SidecarFaults()
    ) -> None:
        num_kv_tokens = settings.num_kv_blocks * settings.block_size
        kv_tokens = None if faults.kv_scale is None else int(num_kv_tokens * faults.kv_scale)
        self.dispatcher = Dispatcher(
            Window(kv_tokens=kv_tokens),
            config,
            DispatchSettings(slack_tokens=settings.max_num_batched_tokens, max_model_len=settings.max_model_len),
        )
        self.upstream = _Upstream(settings, faults.long_prefill_tokens)
        self._faults = faults
        self._requests: dict[str, Request] = {}
        self._errands: dict[str, Errand] = {}
        self._news: list[tuple[float, Callable[[float], None]]] = []  # when, and what to tell the dispatcher then
        self._on_the_wire: deque[tuple[float, Request]] = deque()
        self._gauges: deque[tuple[float, Gauges]] = deque()
        self._now = self._scraped_at = 0.0
        self._num_generated = 0
        self._has_restarted = False
        self._lost: list[RequestOutput] = []

    # -- simulation.SimulatedScheduler

    def add(self, request: Request, now: float) -> None:
        def arrive(at: float) -> None:
            errand = Errand(
                request.request_id,
                request.tenant_id,
                at,
                num_prompt_tokens=max(1, int(request.num_prompt_tokens * self._faults.prompt_scale)),
                max_output_tokens=request.sampling_params.max_tokens,
                user=request.user,
                priority=request.priority,
                is_silent=self._faults.is_silent,
            )
            self._requests[request.request_id] = request
            self._errands[request.request_id] = errand
            self.dispatcher.add(errand, at)
            self._dispatch(at)

        self._news.append((min(request.arrival_time, now), arrive))

    def step(self, now: float) -> Batch | None:
        news, self._news = sorted(self._news, key=itemgetter(0)), []
        for at, tell in news:
            if (due := self.dispatcher.next_event) < at:
                self._dispatch(due)
            tell(at)
        self._dispatch(min(self.dispatcher.next_event, now))
        self._scrape(now)
        if now >= self._faults.restart_at and not self._has_restarted:
            self._restart()
        self._dispatch(now)
        self._arrive(now)
        batch = self.upstream.step(now)
        if batch is None and self._on_the_wire:  # an idle upstream takes what comes
            self._arrive(now + self._faults.hop_seconds)
            batch = self.upstream.step(now)
        return batch

    def update(self, sampled: Sequence[Sampled], now: float) -> list[RequestOutput]:
        return self._hear(self.upstream.update(sampled, now), now) + self._ended_here()

    def _ended_here(self) -> list[RequestOutput]:
        """Requests that never reached the upstream."""
        lost, self._lost = self._lost, []
        ended = [RequestOutput(request_id=i, finish_reason=reason) for i, reason in self.dispatcher.refused()]
        return lost + ended

    def collect(self) -> list[RequestOutput]:
        return self._hear(self.upstream.collect(), self._now) + self._ended_here()

    # -- the wire

    def _dispatch(self, now: float) -> None:
        self._now = now = max(now, self._now)
        self._on_the_wire.extend(
            (now + self._faults.hop_seconds, self._requests[errand.request_id])
            for errand in self.dispatcher.dispatch(now)
        )

    def _arrive(self, now: float) -> None:
        while self._on_the_wire and self._on_the_wire[0][0] <= now:
            self.upstream.add(self._on_the_wire.popleft()[1], now)

    def _hear(self, outputs: list[RequestOutput], now: float) -> list[RequestOutput]:
        """What a proxy sees of these, when its turn comes."""
        self._news += ((now, partial(self._take, output)) for output in outputs)
        return outputs

    def _take(self, output: RequestOutput, now: float) -> None:
        errand = self._errands[output.request_id]
        may_send = False
        if output.token_ids and not errand.is_silent:
            may_send = self.dispatcher.heard(now)
            self.dispatcher.started(errand, now)
            self.dispatcher.generated(errand, len(output.token_ids))
        self._num_generated += len(output.token_ids)
        if output.finish_reason is not None:
            num_prompt_tokens = self._requests[output.request_id].num_prompt_tokens
            self.dispatcher.sized(errand, num_prompt_tokens, output.num_cached_tokens)
            self.dispatcher.counted(errand, output.num_output_tokens)
            self.dispatcher.end(errand, output.finish_reason)
            del self._errands[output.request_id], self._requests[output.request_id]
        if may_send or output.finish_reason is not None or output.num_output_tokens == 1:
            self._dispatch(now)

    def _scrape(self, now: float) -> None:
        if now - self._scraped_at < _SCRAPE_SECONDS:
            return
        self._scraped_at = now
        blocks = self.upstream.request_table.blocks
        if now < self._faults.gauges_freeze_at:
            gauges = Gauges(
                num_waiting=self.upstream.request_table.num_waiting,
                kv_usage=1 - blocks.num_free_blocks / blocks.num_blocks,
                num_preemptions=self.upstream.num_preemptions,
                num_tokens=self._num_generated,
            )
            self._gauges.append((now, gauges))
        while len(self._gauges) > 1 and self._gauges[1][0] <= now - self._faults.gauge_delay:
            self._gauges.popleft()
        if self._gauges and self._gauges[0][0] <= now - self._faults.gauge_delay:
            self.dispatcher.correct(self._gauges[0][1], now)

    def _restart(self) -> None:
        """The upstream is another process: connections break, and its counters begin again."""
        self._has_restarted = True
        self._on_the_wire.clear()
        for errand in [errand for errand in self._errands.values() if errand.flight is not None]:
            if errand.request_id in self.upstream.request_table.requests:
                self.upstream.abort(errand.request_id, FinishReason.ERROR)
            else:
                self.dispatcher.end(errand, FinishReason.ERROR)
                self._lost.append(RequestOutput(request_id=errand.request_id, finish_reason=FinishReason.ERROR))
