"""The published baselines: the server of the VTC artifact and the orders in which it admits requests.

`PublishedServer` does what the artifact's router does (Ying1123/VTC-artifact, `slora/server/router`): whole prompts are
computed in a step of their own, admission is tried every tenth decode step, a request is admitted when the memory that
all running ones can still grow to holds, which takes knowing their output lengths, and nothing is ever preempted.
Which request is next is an `AdmissionOrder`'s business. Costs are 1 for an input and 2 for an output token.
"""

from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from evenhand_engine.scheduler.batch import Batch, BatchPlan
from evenhand_engine.scheduler.request import FinishReason, Request, RequestOutput, Sampled
from evenhand_engine.simulator.measures import INPUT_PRICE, OUTPUT_PRICE
from evenhand_engine.simulator.traces import TraceRequest

DECODE_STEPS_BETWEEN_ADMISSIONS = 10
LEAST_PREFILL_TOKENS = 3_072
MAX_RUNNING_REQUESTS = 1_000
ADAPTER_TOKENS = 32  # of the KV pool, for each tenant in the batch: the artifact tells tenants apart by their LoRA


class AdmissionOrder(Protocol):
    """Who is next. The server asks `head`, and then either admits it or stops filling."""

    def add(self, request: Request) -> None:
        """Queue the request."""
        ...

    def head(self) -> Request | None:
        """The request to admit next; None: nothing waits."""
        ...

    def admit(self, request: Request) -> None:
        """Take the head out of the queue and charge its prompt."""
        ...

    def misfit(self) -> None:
        """The head does not fit into memory; the server stops filling."""
        ...

    def charge(self, running: Sequence[Request]) -> None:
        """One decode step of the running requests."""
        ...

    def finish(self, request: Request) -> None:
        """The request has its last token."""
        ...


class FirstComeFirstServed:
    """One queue, in order of arrival."""

    def __init__(self) -> None:
        self._waiting: deque[Request] = deque()

    def add(self, request: Request) -> None:
        self._waiting.append(request)

    def head(self) -> Request | None:
        return self._waiting[0] if self._waiting else None

    def admit(self, request: Request) -> None:
        self._waiting.popleft()

    def misfit(self) -> None:
        pass

    def charge(self, running: Sequence[Request]) -> None:
        pass

    def finish(self, request: Request) -> None:
        pass


class RequestsPerMinute:
    """A door, not an order: refuses a tenant's request when `limit` were accepted in the 60 s before it."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._accepted: dict[str, deque[float]] = {}

    def admits(self, asked: TraceRequest) -> bool:
        recent = self._accepted.setdefault(asked.tenant_id, deque())
        while recent and asked.arrival_time - recent[0] > 60.0:
            recent.popleft()
        if len(recent) >= self._limit:
            return False
        recent.append(asked.arrival_time)
        return True


class LeastCounter:
    """The tenant with the least service, counted as it is given: VTC with the lift, LCF without.

    With `predict`, the output that it foretells is charged at admission already and settled at the end: the published
    oracle foretells the truth.
    """

    def __init__(self, *, lift: bool = True, predict: Callable[[Request], float] | None = None) -> None:
        self._lift = lift
        self._predict = predict
        self._waiting: dict[str, deque[Request]] = {}
        self._counters: dict[str, float] = {}
        self._predicted: dict[str, float] = {}

    def add(self, request: Request) -> None:
        tenant = request.tenant_id
        queue = self._waiting.setdefault(tenant, deque())
        counter = self._counters.setdefault(tenant, 0.0)
        if self._lift and not queue:
            others = [self._counters[other] for other, waiting in self._waiting.items() if waiting]
            self._counters[tenant] = max(counter, min(others, default=counter))
        queue.append(request)

    def head(self) -> Request | None:
        waiting = [tenant for tenant, queue in self._waiting.items() if queue]
        return self._waiting[min(waiting, key=self._counters.__getitem__)][0] if waiting else None

    def admit(self, request: Request) -> None:
        self._waiting[request.tenant_id].popleft()
        predicted = self._predict(request) if self._predict else 0.0
        self._predicted[request.request_id] = predicted
        self._counters[request.tenant_id] += INPUT_PRICE * request.num_prompt_tokens + OUTPUT_PRICE * predicted

    def misfit(self) -> None:
        pass

    def charge(self, running: Sequence[Request]) -> None:
        for request in running:
            if request.num_output_tokens >= self._predicted[request.request_id]:
                self._counters[request.tenant_id] += OUTPUT_PRICE

    def finish(self, request: Request) -> None:
        surplus = self._predicted.pop(request.request_id) - request.num_output_tokens
        self._counters[request.tenant_id] -= OUTPUT_PRICE * max(0.0, surplus)


def oracle(request: Request) -> float:
    """The true number of output tokens, which the published server is told."""
    return request.sampling_params.max_tokens


class DeficitRoundRobin:
    """Tenants in turn, each while its deficit lasts; outputs are charged as they come, so a deficit can be a debt."""

    def __init__(self, quantum: float) -> None:
        self._quantum = quantum
        self._waiting: dict[str, deque[Request]] = {}
        self._deficits: dict[str, float] = {}
        self._ring: deque[str] = deque()
        self._is_visiting = False  # the first of the ring had its quantum on this visit
        self._last_misfit: str | None = None

    def add(self, request: Request) -> None:
        queue = self._waiting.setdefault(request.tenant_id, deque())
        self._deficits.setdefault(request.tenant_id, 0.0)
        if not queue and request.tenant_id not in self._ring:
            self._ring.append(request.tenant_id)
        queue.append(request)

    def head(self) -> Request | None:
        while self._ring:
            tenant = self._ring[0]
            if not self._is_visiting:
                if tenant == self._last_misfit and self._deficits[tenant] < 0:
                    self._last_misfit = None
                    self._ring.rotate(-1)
                    continue
                if self._deficits[tenant] <= 0:
                    self._deficits[tenant] += self._quantum
                self._is_visiting = True
            if self._waiting[tenant] and self._deficits[tenant] > 0:
                return self._waiting[tenant][0]
            self._is_visiting = False
            self._ring.popleft()
            if self._waiting[tenant] or self._deficits[tenant] < 0:
                self._ring.append(tenant)
        return None

    def admit(self, request: Request) -> None:
        self._waiting[request.tenant_id].popleft()
        self._deficits[request.tenant_id] -= INPUT_PRICE * request.num_prompt_tokens

    def misfit(self) -> None:
        self._last_misfit = self._ring[0]
        self._is_visiting = False

    def charge(self, running: Sequence[Request]) -> None:
        for request in running:
            self._deficits[request.tenant_id] -= OUTPUT_PRICE

    def finish(self, request: Request) -> None:
        pass


class PublishedServer:
    """The artifact's batching and memory rule around an `AdmissionOrder`. Drop-in for `Scheduler` in a simulation.

    `max_tokens` of a request must be the number of tokens that it will produce.
    """

    def __init__(self, order: AdmissionOrder, num_kv_tokens: int) -> None:
        self._order = order
        self._num_kv_tokens = num_kv_tokens
        self._max_prefill_tokens = max(num_kv_tokens // 6, LEAST_PREFILL_TOKENS)
        self._running: list[Request] = []
        self._decode_steps_left = 0
        self._num_steps = 0
        self._num_seats = 0  # each request has one of its own
        self._in_step: list[Request] = []

    def add(self, request: Request, now: float) -> None:
        self._order.add(request)

    def step(self, now: float) -> Batch | None:
        admitted = [] if self._running and self._decode_steps_left else self._admit()
        if admitted:
            self._decode_steps_left = DECODE_STEPS_BETWEEN_ADMISSIONS
            self._running += admitted
            return self._batch(admitted, num_decodes=0)
        if not self._running:
            return None
        self._decode_steps_left = max(0, self._decode_steps_left - 1)
        self._order.charge(self._running)
        return self._batch(self._running, num_decodes=len(self._running))

    def update(self, sampled: Sequence[Sampled], now: float) -> list[RequestOutput]:
        outputs = []
        for request, result in zip(self._in_step, sampled, strict=True):
            request.num_in_flight_tokens = 0
            request.token_ids.extend(result.token_ids)
            is_last = request.num_output_tokens == request.sampling_params.max_tokens
            if is_last:
                request.finish_reason = FinishReason.LENGTH
            outputs.append(
                RequestOutput(
                    request_id=request.request_id, token_ids=result.token_ids, finish_reason=request.finish_reason
                )
            )
        if any(request.finish_reason for request in self._running):
            self._settle()
        return outputs

    def collect(self) -> list[RequestOutput]:
        return []

    def _batch(self, requests: list[Request], num_decodes: int) -> Batch:
        """All pending tokens of the requests, the first `num_decodes` of which are past their prompt."""
        plan = BatchPlan()
        plan.add_decodes(requests[:num_decodes])
        for request in requests[num_decodes:]:
            request.seat = self._num_seats
            request.block_table = [self._num_seats]  # one stands for all: memory is counted in tokens here
            self._num_seats += 1
            plan.add_chunk(request, request.num_prompt_tokens)
        self._num_steps += 1
        self._in_step = plan.requests
        return plan.build(self._num_steps, ())

    def _settle(self) -> None:
        """A request finished: charge the whole batch once more, as the artifact does and its measurements have it."""
        self._order.charge(self._running)
        for request in self._running:
            if request.finish_reason is not None:
                self._order.finish(request)
        self._running = [request for request in self._running if request.finish_reason is None]

    def _admit(self) -> list[Request]:
        admitted: list[Request] = []
        num_prefill_tokens = 0
        while (request := self._order.head()) is not None:
            num_prefill_tokens += request.num_prompt_tokens
            is_full = bool(admitted) and num_prefill_tokens > self._max_prefill_tokens
            if is_full or not self._fits([*self._running, *admitted], request):
                self._order.misfit()
                break
            self._order.admit(request)
            admitted.append(request)
        return admitted

    def _fits(self, running: Sequence[Request], request: Request) -> bool:
        """Whether memory holds at every moment until all of them have finished, longest remaining output first."""
        if len(running) >= MAX_RUNNING_REQUESTS:
            return False
        candidates = (*running, request)
        held = np.array([r.num_prompt_tokens + max(1, r.num_output_tokens) for r in candidates])
        remaining = np.array([r.sampling_params.max_tokens - r.num_output_tokens - 1 for r in candidates])
        order = np.argsort(-remaining, kind="stable")
        counts = np.arange(1, len(order) + 1)
        num_needed = (remaining[order] * counts + np.cumsum(held[order])).max()
        num_adapters = len({r.tenant_id for r in candidates})
        return bool(num_needed < self._num_kv_tokens - ADAPTER_TOKENS * num_adapters)
