"""Ideal fluid sharing: what each tenant would get if service were divisible. What real schedulers approach.

`FluidShare` knows only a capacity and is exact; `StreamLimitedFluid` also knows that a stream cannot run faster than
one token a step.
"""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from heapq import heappop, heappush

import numpy as np

from evenhand_engine.simulator.measures import (
    INPUT_PRICE,
    OUTPUT_PRICE,
    Delivery,
    FloatArray,
    RequestRecord,
    ServiceDifference,
    Windows,
    demand_in,
    difference_of,
    service_difference,
    tenant_ids,
)

_NOTHING = 1e-6  # of a unit of price: what rounding leaves


class FluidShare:
    """Weighted max-min sharing of a constant capacity: every backlogged tenant is served at once, bit by bit.

    Generalised processor sharing (Parekh and Gallager, 1993): virtual time grows at capacity / (weights of the
    backlogged), and a tenant is busy over spans of it.
    """

    def __init__(
        self, records: Sequence[RequestRecord], capacity: float, weights: Mapping[str, float] | None = None
    ) -> None:
        """`capacity` in units of price per second; a tenant without a weight has 1."""
        self._weights = {tenant: (weights or {}).get(tenant, 1.0) for tenant in tenant_ids(records)}
        self._capacity = capacity
        self._times: list[float] = [0.0]
        self._virtual_times: list[float] = [0.0]
        self._busy: dict[str, list[list[float]]] = {tenant: [] for tenant in self._weights}
        self._serve(sorted(records, key=lambda record: record.arrival_time))

    def cumulative_service(self, tenants: Sequence[str], times: FloatArray) -> FloatArray:
        """`[tenants, times]`: service in units of price that each tenant has received by each time."""
        virtual = np.interp(times, self._times, self._virtual_times)
        delivered = np.zeros((len(tenants), len(times)))
        for i, tenant in enumerate(tenants):
            for start, end in self._busy.get(tenant, ()):
                delivered[i] += self._weights[tenant] * np.clip(virtual - start, 0.0, end - start)
        return delivered

    def service_difference(self, records: Sequence[RequestRecord], windows: Windows | None = None) -> ServiceDifference:
        """The published metric of this ideal run."""
        windows = windows or Windows()
        tenants = tenant_ids(records)
        service = self.cumulative_service(tenants, windows.ends) - self.cumulative_service(tenants, windows.starts)
        return difference_of(service, demand_in(records, tenants, windows), windows)

    def _serve(self, records: Sequence[RequestRecord]) -> None:
        drains: list[tuple[float, str]] = []  # (virtual time at which a tenant runs dry, tenant), stale ones included
        now, virtual, active = 0.0, 0.0, 0.0

        def advance(until: float) -> None:
            nonlocal now, virtual, active
            while drains:
                end, tenant = drains[0]
                if self._busy[tenant][-1][1] == end:
                    drained_at = now + (end - virtual) * active / self._capacity
                    if drained_at > until:
                        virtual += (until - now) * self._capacity / active
                        break
                    now, virtual = drained_at, end
                    active -= self._weights[tenant]
                    self._note(now, virtual)
                heappop(drains)
            now = until
            self._note(now, virtual)

        for record in records:
            advance(record.arrival_time)
            spans = self._busy[record.tenant_id]
            if not spans or spans[-1][1] <= virtual:
                spans.append([virtual, virtual])
                active += self._weights[record.tenant_id]
            spans[-1][1] += record.cost / self._weights[record.tenant_id]
            heappush(drains, (spans[-1][1], record.tenant_id))
        advance(now + sum(record.cost for record in records) / self._capacity)

    def _note(self, now: float, virtual: float) -> None:
        self._times.append(now)
        self._virtual_times.append(virtual)


@dataclass(slots=True)
class _Owed:
    """What a request has not been given yet, in units of price, and when it got its first token."""

    record: RequestRecord
    prompt: float
    output: float
    first_token_time: float | None = None

    @classmethod
    def of(cls, record: RequestRecord) -> "_Owed":
        return cls(record, INPUT_PRICE * record.num_prompt_tokens, OUTPUT_PRICE * record.num_output_tokens)


class StreamLimitedFluid:
    """Max-min sharing between tenants of equal weight, where a request's outputs come at most one a step.

    Time moves in ticks of `tick` seconds. Inside a tenant the oldest request is served first, each as fast as its
    stream allows; its prompt has no limit but the capacity. A stream that its tenant's share no longer covers stops, at
    no cost, and goes on when it does.

    Attributes:
        records: the requests as this ideal run serves them, with the times of their first and last tokens.
    """

    def __init__(
        self, records: Sequence[RequestRecord], capacity: float, step_seconds: float, tick: float = 0.1
    ) -> None:
        """`capacity` in units of price per second."""
        self.records: list[RequestRecord] = []
        self._tenants = tenant_ids(records)
        self._tick = tick
        self._budget = capacity * tick
        self._stream_limit = OUTPUT_PRICE * tick / step_seconds
        self._curve = self._serve(records)

    def service_difference(
        self, windows: Windows | None = None, delivery: Delivery = Delivery.SPREAD
    ) -> ServiceDifference:
        """The published metric of this ideal run; `Delivery.TOKENS`: by what each tenant truly got in each window."""
        if delivery is Delivery.SPREAD:
            return service_difference(self.records, windows)
        windows = windows or Windows()
        times = np.arange(len(self._curve)) * self._tick
        service = np.stack(
            [np.interp(windows.ends, times, row) - np.interp(windows.starts, times, row) for row in self._curve.T]
        )
        return difference_of(service, demand_in(self.records, self._tenants, windows), windows)

    def _serve(self, records: Sequence[RequestRecord]) -> FloatArray:
        position = {tenant: i for i, tenant in enumerate(self._tenants)}
        arrivals = deque(sorted(records, key=lambda record: record.arrival_time))
        outstanding: list[list[_Owed]] = [[] for _ in self._tenants]
        curve = [np.zeros(len(self._tenants))]
        while arrivals or any(outstanding):
            now = (len(curve) - 1) * self._tick
            while arrivals and arrivals[0].arrival_time <= now:
                record = arrivals.popleft()
                outstanding[position[record.tenant_id]].append(_Owed.of(record))
            given = max_min_shares(np.array([self._demand(owed) for owed in outstanding]), self._budget)
            for i, amount in enumerate(given):
                outstanding[i] = self._drain(outstanding[i], float(amount), now + self._tick)
            curve.append(curve[-1] + given)
        return np.array(curve)

    def _demand(self, outstanding: list[_Owed]) -> float:
        return sum(owed.prompt + min(owed.output, self._stream_limit) for owed in outstanding)

    def _drain(self, outstanding: list[_Owed], amount: float, until: float) -> list[_Owed]:
        """Give `amount` to the oldest; returns those that are owed more."""
        left = []
        for owed in outstanding:
            prompt = min(owed.prompt, amount)
            output = min(owed.output, self._stream_limit, amount - prompt)
            owed.prompt -= prompt
            owed.output -= output
            amount -= prompt + output
            if owed.first_token_time is None and output > 0:
                owed.first_token_time = until
            if owed.prompt + owed.output > _NOTHING:
                left.append(owed)
            else:
                first = owed.first_token_time or until
                self.records.append(replace(owed.record, first_token_time=first, finish_time=until, token_times=None))
        return left


def max_min_shares(demands: FloatArray, budget: float) -> FloatArray:
    """Divide `budget` so that nobody gets more than it demands and no smaller share could be raised; `[tenants]`."""
    if demands.sum() <= budget:
        return demands
    order = np.argsort(demands)
    shares = np.empty_like(demands)
    for num_left, i in zip(range(len(order), 0, -1), order, strict=True):
        shares[i] = min(demands[i], budget / num_left)
        budget -= shares[i]
    return shares
