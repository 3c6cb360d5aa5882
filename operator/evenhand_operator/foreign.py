"""Foreign pools: those that another installation of the operator serves. This one leaves them, and their policies, alone.

Two installations that both served a pool would overtake each other's epochs and rewrite each other's statuses for ever. So a
pool's status names its installation, by its Lease, and whoever finds another one there does nothing to the pool but say so
on it, as a manager of fields of its own. Pure but for `ForeignPools`.
"""

import asyncio
import logging
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import msgspec

from evenhand_operator import metrics
from evenhand_operator.clock import SYSTEM_CLOCK, Clock
from evenhand_operator.kube import ApiError, KubeClient
from evenhand_operator.objects import ObjectKey, write_time
from evenhand_operator.observed import STRANGERS, ObservedPolicy, ObservedPool
from evenhand_operator.resources import ENGINE_POOLS
from evenhand_policy.status import Condition, ConditionStatus

log = logging.getLogger(__name__)

CONDITION = "ForeignOperator"
_REPEAT_SECONDS, _GONE_SECONDS = 300.0, 900.0
_MAX_MANAGER_CHARACTERS = 128


class Ownership(NamedTuple):
    """What this installation serves."""

    policies: tuple[ObservedPolicy, ...]
    pools: tuple[ObservedPool, ...]


def look_whose(policies: Iterable[ObservedPolicy], pools: Iterable[ObservedPool], installation: str) -> Ownership:
    """A pool without an installation in its status is whoever's comes first."""
    own: list[ObservedPool] = []
    foreign: set[ObjectKey] = set()
    for pool in pools:
        if is_foreign(pool, installation):
            foreign.add(pool.key)
        else:
            own.append(pool)
    served = tuple(policy for policy in policies if policy.policy is None or policy.policy.pool_key not in foreign)
    return Ownership(served, tuple(own))


def is_foreign(pool: ObservedPool, installation: str) -> bool:
    """Whether another installation has said that it serves the pool."""
    return pool.status.operator not in (None, "", installation)


class ForeignPools:
    """Says on each foreign pool that there is a second installation, for as long as there is.

    It says so again from time to time. On a pool of ours, what a second installation has not said for long is taken back in
    its name: it was removed without a chance to do so itself.

    Args:
        installation: namespace and name of the Lease by which this one's replicas agree.
    """

    def __init__(self, kube: KubeClient, installation: str, clock: Clock = SYSTEM_CLOCK) -> None:
        self._kube = kube
        self._installation = installation
        self._clock = clock
        self._manager = f"{STRANGERS}{installation}"[:_MAX_MANAGER_CHARACTERS]
        self._told: dict[ObjectKey, float] = {}  # monotonic time at which it was last said
        self._heard: dict[tuple[ObjectKey, str], tuple[str, float]] = {}  # from strangers: when, and when that was seen

    async def look(self, pools: Iterable[ObservedPool]) -> None:
        """To be called now and then, with all pools. What cannot be written now is at the next call."""
        own: list[ObservedPool] = []
        foreign: dict[ObjectKey, ObservedPool] = {}
        for pool in pools:
            if is_foreign(pool, self._installation):
                foreign[pool.key] = pool
            else:
                own.append(pool)
        metrics.FOREIGN_POOLS.set(len(foreign))
        await self._tell(foreign)
        await self._forget_strangers(own)

    async def take_back(self) -> None:
        """Before the end."""
        await asyncio.gather(*(self._write(key, self._manager, None) for key in self._told))

    async def _tell(self, foreign: Mapping[ObjectKey, ObservedPool]) -> None:
        now = self._clock.monotonic()
        for key, pool in foreign.items():
            if key not in self._told:
                log.error(
                    "EnginePool %s/%s is served by the operator of Lease %s, and left alone", *key, pool.status.operator
                )
            elif now - self._told[key] < _REPEAT_SECONDS:
                continue
            if await self._write(key, self._manager, self._condition(pool)):
                self._told[key] = now
        for key in self._told.keys() - foreign.keys():
            if await self._write(key, self._manager, None):
                del self._told[key]

    async def _forget_strangers(self, own: Iterable[ObservedPool]) -> None:
        now, before, self._heard = self._clock.monotonic(), self._heard, {}
        for pool in own:
            for manager, said_at in pool.strangers:
                known = before.get((pool.key, manager))
                heard = known if known is not None and known[0] == said_at else (said_at, now)
                self._heard[pool.key, manager] = heard
                if now - heard[1] >= _GONE_SECONDS or manager == self._manager:
                    await self._write(pool.key, manager, None)

    def _condition(self, pool: ObservedPool) -> Condition:
        now = write_time(self._clock.wall())
        message = (
            f"The operator of Lease {self._installation} sees this pool too, and leaves it alone (at {now}): that of Lease "
            f"{pool.status.operator} serves it. Stop one of the two; to move the pool, clear status.operator"
        )
        return Condition(
            type=CONDITION,
            status=ConditionStatus.TRUE,
            observed_generation=pool.generation,
            last_transition_time=now,
            reason=CONDITION,
            message=message,
        )

    async def _write(self, key: ObjectKey, manager: str, condition: Condition | None) -> bool:
        """Set the condition, or take it back; a pool that is gone has none."""
        namespace, name = key
        conditions = [msgspec.to_builtins(condition)] if condition is not None else []
        obj = {"metadata": {"name": name, "namespace": namespace}, "status": {"conditions": conditions}}
        try:
            await self._kube.apply(ENGINE_POOLS, obj, "status", manager=manager)
        except ApiError as error:
            if error.status != 404:
                log.warning("cannot tell of the second operator on EnginePool %s/%s: %s", *key, error)
            return error.status == 404
        return True
