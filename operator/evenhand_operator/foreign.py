"""Foreign pools: those that another installation of the operator serves. This one leaves them, and their policies, alone.

Two installations that both served a pool would overtake each other's epochs and rewrite each other's statuses for ever. So a
pool's status names its installation, by its Lease, and whoever finds another one there does nothing to the pool but say so
on it, as a manager of fields of its own. Pure but for `ForeignPools`.
"""

import logging
import time
from collections.abc import Iterable
from typing import NamedTuple

import msgspec

from evenhand_operator import metrics
from evenhand_operator.kube import ENGINE_POOLS, FIELD_MANAGER, ApiError, KubeClient
from evenhand_operator.objects import ObjectKey, write_time
from evenhand_operator.observed import ObservedPolicy, ObservedPool
from evenhand_policy.status import Condition, ConditionStatus

log = logging.getLogger(__name__)

CONDITION = "ForeignOperator"


class Ownership(NamedTuple):
    """What this installation serves, and the pools that it does not."""

    policies: tuple[ObservedPolicy, ...]
    pools: tuple[ObservedPool, ...]
    foreign: tuple[ObservedPool, ...]


def look_whose(policies: Iterable[ObservedPolicy], pools: Iterable[ObservedPool], installation: str) -> Ownership:
    """A pool without an installation in its status is whoever's comes first."""
    own: list[ObservedPool] = []
    foreign: list[ObservedPool] = []
    for pool in pools:
        (foreign if is_foreign(pool, installation) else own).append(pool)
    keys = {pool.key for pool in foreign}
    served = tuple(policy for policy in policies if policy.policy is None or policy.policy.pool_key not in keys)
    return Ownership(served, tuple(own), tuple(foreign))


def is_foreign(pool: ObservedPool, installation: str) -> bool:
    """Whether another installation has said that it serves the pool."""
    return pool.status.operator not in (None, "", installation)


class ForeignPools:
    """Says on each foreign pool that there is a second installation; once, and no longer than it is foreign.

    Args:
        installation: namespace and name of the Lease by which this one's replicas agree.
    """

    def __init__(self, kube: KubeClient, installation: str) -> None:
        self._kube = kube
        self._installation = installation
        self._manager = f"{FIELD_MANAGER}/{installation}"[:128]
        self._told: set[ObjectKey] = set()

    async def tell(self, foreign: Iterable[ObservedPool]) -> None:
        """What is told already is not told again; what cannot be told now is at the next call."""
        found = {pool.key: pool for pool in foreign}
        metrics.FOREIGN_POOLS.set(len(found))
        for key in found.keys() - self._told:
            pool = found[key]
            log.error(
                "EnginePool %s/%s is served by the operator of Lease %s, and left alone", *key, pool.status.operator
            )
            if await self._write(key, self._condition(pool)):
                self._told.add(key)
        for key in self._told - found.keys():
            if await self._write(key, None):
                self._told.discard(key)

    def _condition(self, pool: ObservedPool) -> Condition:
        message = (
            f"The operator of Lease {self._installation} sees this pool too, and leaves it alone: that of Lease "
            f"{pool.status.operator} serves it. Stop one of the two; to move the pool, clear status.operator"
        )
        return Condition(
            type=CONDITION,
            status=ConditionStatus.TRUE,
            observed_generation=pool.generation,
            last_transition_time=write_time(time.time()),
            reason=CONDITION,
            message=message,
        )

    async def _write(self, key: ObjectKey, condition: Condition | None) -> bool:
        """Set the condition, or take it back; a pool that is gone has none."""
        namespace, name = key
        conditions = [msgspec.to_builtins(condition)] if condition is not None else []
        obj = {"metadata": {"name": name, "namespace": namespace}, "status": {"conditions": conditions}}
        try:
            await self._kube.apply(ENGINE_POOLS, obj, "status", manager=self._manager)
        except ApiError as error:
            if error.status != 404:
                log.warning("cannot tell of the second operator on EnginePool %s/%s: %s", *key, error)
            return error.status == 404
        return True
