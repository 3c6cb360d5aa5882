"""A door, and what is asked of it."""

import pytest

from evenhand_engine.errors import Refusal
from evenhand_engine.frontend.account import Cost, Reservation
from evenhand_engine.frontend.admission import Admission
from evenhand_policy.config import Limits, SchedulerConfig, TenantConfig

CONTEXT = 1000


def config(**fields: object) -> SchedulerConfig:
    limits = {name: fields.pop(name) for name in list(fields) if name in Limits.__struct_fields__}
    return SchedulerConfig(tenants=(TenantConfig(tenant_id="a", limits=Limits(**limits), **fields),))  # type: ignore[arg-type]


def admission(now: float = 0.0, num_replicas: int = 1, **fields: object) -> Admission:
    return Admission(config(**fields), max_model_len=CONTEXT, now=now, num_replicas=num_replicas)


def reserve(door: Admission, prompt: int = 10, output: int = 10, now: float = 0.0, count: int = 1) -> list[Reservation]:
    return door.reserve("a", [Cost(prompt, output)] * count, now)


def refusal(door: Admission, prompt: int = 10, output: int = 10, now: float = 0.0, count: int = 1) -> Refusal:
    with pytest.raises(Refusal) as caught:
        reserve(door, prompt, output, now, count)
    return caught.value


def open_ended(door: Admission, now: float = 0.0, prompt: int = 10) -> Reservation:
    """As of a chat without `max_tokens`."""
    cost = Cost(prompt, door.max_output_tokens("a", prompt), door.expected_output_tokens("a"))
    (reservation,) = door.reserve("a", [cost], now)
    door.start(reservation)
    return reservation
