"""Measures of fairness: what a run of the engine, real or simulated, gave to each tenant.

The service difference, the accumulated gap and the throughput are those of "Fairness in Serving Large Language Models"
(Sheng et al., OSDI'24), as its artifact computes them: fed with its recorded runs, this module gives its figures. A
token's price is the pool's default, 1 for input and 2 for output. Everything here is computed after the fact; nothing here decides.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

import numpy as np
from numpy.typing import NDArray

from evenhand_policy.config import Prices

FloatArray = NDArray[np.float64]

INPUT_PRICE = Prices().input_token
OUTPUT_PRICE = Prices().output_token


@dataclass(frozen=True, slots=True)
class RequestRecord:
    """What one request asked for and what it got. Times in seconds from the start of the run.

    Attributes:
        first_token_time: None: no token came (refused, aborted or unfinished).
        finish_time: of the last token; None as above.
        token_times: when each output token came, `[num_output_tokens]`; None where only first and last are known.
        num_preemptions: how often it lost its KV blocks while running.
        num_cached_tokens: prompt tokens that a prefix hit spared.
    """

    tenant_id: str
    arrival_time: float
    num_prompt_tokens: int
    num_output_tokens: int
    first_token_time: float | None = None
    finish_time: float | None = None
    token_times: FloatArray | None = None
    num_preemptions: int = 0
    num_cached_tokens: int = 0

    @property
    def cost(self) -> int:
        return INPUT_PRICE * self.num_prompt_tokens + OUTPUT_PRICE * self.num_output_tokens

    @property
    def is_served(self) -> bool:
        return self.finish_time is not None


class Delivery(Enum):
    """When a request's service counts as delivered."""

    SPREAD = "spread"  # evenly between its first token and its finish: the published metric, deaf to pauses
    TOKENS = "tokens"  # the prompt with the first token, each output token when it comes


@dataclass(frozen=True, slots=True)
class Windows:
    """The sliding windows of the published metric: `[k * stride, k * stride + width]` for k = 1 .. `count` - 1."""

    duration: float = 600.0
    warmup: float = 30.0
    width: float = 60.0
    count: int = 20

    @property
    def starts(self) -> FloatArray:
        return np.arange(1, self.count) * (self.duration - self.warmup) / self.count

    @property
    def ends(self) -> FloatArray:
        return self.starts + self.width


@dataclass(frozen=True, slots=True)
class ServiceDifference:
    """Unfairness of a run over its windows, in service per second: how far tenants are from max-min sharing."""

    maximum: float
    mean: float
    variance: float


def service_difference(
    records: Sequence[RequestRecord], windows: Windows | None = None, delivery: Delivery = Delivery.SPREAD
) -> ServiceDifference:
    """Sum over tenants of min(largest service - its service, |its demand - its service|) in each window.

    Demand is the cost of the requests that arrive in the window, both ends included. Requests that were not served are
    neither demand nor service: the measure rewards refusal, so read it beside `throughput` and the number served.
    """
    windows = windows or Windows()
    served = [record for record in records if record.is_served]
    tenants = tenant_ids(served)
    service = cumulative_service(served, tenants, windows.ends, delivery) - cumulative_service(
        served, tenants, windows.starts, delivery
    )
    return difference_of(service, demand_in(served, tenants, windows), windows)


def difference_of(service: FloatArray, demand: FloatArray, windows: Windows) -> ServiceDifference:
    """The service difference of `service` and `demand`, each `[tenants, windows]` in units of price. Nobody: 0."""
    if not len(service):
        return ServiceDifference(0.0, 0.0, 0.0)
    rate, wanted = service / windows.width, demand / windows.width
    per_window = np.minimum(rate.max(axis=0) - rate, np.abs(wanted - rate)).sum(axis=0)
    return ServiceDifference(float(per_window.max()), float(per_window.mean()), float(per_window.var()))


def accumulated_gap(
    records: Sequence[RequestRecord], windows: Windows | None = None, delivery: Delivery = Delivery.SPREAD
) -> float:
    """Largest distance between the most and the least served tenant since the end of the warm-up; nobody served: 0."""
    windows = windows or Windows()
    served = [record for record in records if record.is_served]
    if not served:
        return 0.0
    tenants = tenant_ids(served)
    start = np.array([windows.warmup])
    since = cumulative_service(served, tenants, windows.warmup + windows.starts, delivery) - cumulative_service(
        served, tenants, start, delivery
    )
    return float((since.max(axis=0) - since.min(axis=0)).max())


def throughput(records: Sequence[RequestRecord]) -> float:
    """Input and output tokens of all served requests per second until the last finish."""
    finishes = [record.finish_time for record in records if record.finish_time is not None]
    tokens = sum(r.num_prompt_tokens + r.num_output_tokens for r in records if r.is_served)
    return tokens / max(finishes) if finishes else 0.0


def jain_index(shares: Sequence[float]) -> float:
    """1 when all shares are equal, 1/n when one has everything (Jain, Chiu and Hawe, 1984). Empty or all zero: 1."""
    values = np.asarray(shares, dtype=np.float64)
    squares = float((values**2).sum())
    return float(values.sum()) ** 2 / (len(values) * squares) if squares else 1.0


def slo_attainment(values: Sequence[float] | FloatArray, objective: float, num_missing: int = 0) -> float:
    """Share of `values` that are within `objective`; those that never came (`num_missing`) miss it. Nothing asked: 1."""
    total = len(values) + num_missing
    return float((np.asarray(values) <= objective).sum()) / total if total else 1.0


def share_of_entitlement(received: FloatArray, entitled: FloatArray) -> FloatArray:
    """What each tenant received over what it was entitled to, `[tenants]`; 1 for one that was entitled to nothing."""
    return np.divide(received, entitled, out=np.ones_like(received), where=entitled > 0)


def tenant_ids(records: Sequence[RequestRecord]) -> list[str]:
    return sorted({record.tenant_id for record in records})


def demand_in(records: Sequence[RequestRecord], tenants: Sequence[str], windows: Windows) -> FloatArray:
    """`[tenants, windows]`: cost of the requests that arrive in each window, both ends included."""
    index, cost = _tenant_index(records, tenants), _costs(records)
    arrivals = np.array([record.arrival_time for record in records], dtype=np.float64)
    inside = (arrivals >= windows.starts[:, None]) & (arrivals <= windows.ends[:, None])
    return _sum_by_tenant(index, inside * cost, len(tenants))


def cumulative_service(
    records: Sequence[RequestRecord], tenants: Sequence[str], times: FloatArray, delivery: Delivery
) -> FloatArray:
    """`[tenants, times]`: service in units of price that each tenant has received by each time.

    Raises:
        ValueError: `Delivery.TOKENS` is asked of a record that has no token times.
    """
    if delivery is Delivery.TOKENS:
        return _by_tokens(records, tenants, times)
    first = np.array([record.first_token_time for record in records], dtype=np.float64)
    finish = np.array([record.finish_time for record in records], dtype=np.float64)
    length = np.maximum(finish - first, 1e-9)
    delivered = np.clip((times[:, None] - first) / length, 0.0, 1.0) * _costs(records)
    return _sum_by_tenant(_tenant_index(records, tenants), delivered, len(tenants))


def _by_tokens(records: Sequence[RequestRecord], tenants: Sequence[str], times: FloatArray) -> FloatArray:
    position = {tenant: i for i, tenant in enumerate(tenants)}
    delivered = np.zeros((len(tenants), len(times)))
    for record in records:
        if record.token_times is None or record.first_token_time is None:
            raise ValueError(f"a request of tenant {record.tenant_id} has no token times: simulate it, or use SPREAD")
        tokens = np.searchsorted(record.token_times, times, side="right")
        prompt = INPUT_PRICE * record.num_prompt_tokens * (times >= record.first_token_time)
        delivered[position[record.tenant_id]] += prompt + OUTPUT_PRICE * tokens
    return delivered


def _tenant_index(records: Sequence[RequestRecord], tenants: Sequence[str]) -> NDArray[np.intp]:
    position = {tenant: i for i, tenant in enumerate(tenants)}
    return np.array([position[record.tenant_id] for record in records], dtype=np.intp)


def _costs(records: Sequence[RequestRecord]) -> FloatArray:
    return np.array([record.cost for record in records], dtype=np.float64)


def _sum_by_tenant(index: NDArray[np.intp], values: FloatArray, num_tenants: int) -> FloatArray:
    """`values` is `[times, requests]`; the sum over each tenant's requests is `[tenants, times]`."""
    return np.stack([np.bincount(index, weights=row, minlength=num_tenants) for row in values], axis=1)
