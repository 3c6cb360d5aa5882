"""Documents: the current document of every pool, and what came of every policy when it was last compiled."""

import asyncio
from collections.abc import Callable, Mapping

from evenhand_operator.bootstrap_store import BootstrapStore
from evenhand_operator.engine_client import Offer
from evenhand_operator.objects import ObjectKey
from evenhand_operator.observed import ObservedPolicy
from evenhand_operator.pod_link import Version
from evenhand_operator.reconcile import Plan, World, make_plan
from evenhand_operator.rollout import Rollout
from evenhand_policy.push_protocol import body_digest


class Documents:
    """One leader's documents.

    Attributes:
        plan: what was last compiled; empty before the first time.
        policies: by uid, as they were compiled.
    """

    def __init__(self, store: BootstrapStore, epoch: Callable[[], int]) -> None:
        self.plan = Plan({}, {})
        self.policies: Mapping[str, ObservedPolicy] = {}
        self._store = store
        self._epoch = epoch
        self._rollouts: dict[ObjectKey, Rollout] = {}  # of pools that are gone too: theirs may come back
        self._encoded: dict[ObjectKey, tuple[Version, bytes, str]] = {}

    async def rebuild(self, world: World) -> None:
        """Compile everything. Raises ApiError where what an earlier leader stored cannot be read; nothing changes."""
        plan = await asyncio.to_thread(make_plan, world)
        policies = {observed.uid: observed for observed in world.policies}
        for key in plan.pools.keys() - self._rollouts.keys():
            self._rollouts[key] = await self._continue(key, plan)
        for key, pool in plan.pools.items():
            self._rollouts[key].advance(pool.config, policies)
        self.plan, self.policies = plan, policies

    def rollout(self, pool: ObjectKey) -> Rollout:
        """Of a pool that has a plan."""
        return self._rollouts[pool]

    def offer(self, pool: ObjectKey, num_replicas: int, offered_at: float) -> Offer:
        """What the pods of a pool that has a plan are to enforce."""
        rollout = self._rollouts[pool]
        encoded = self._encoded.get(pool)
        if encoded is None or encoded[0] != rollout.version:
            document = rollout.document.canonical_json()
            encoded = self._encoded[pool] = (rollout.version, document, body_digest(document))
        version, document, digest = encoded
        return Offer(document, digest, *version, num_replicas, self.plan.pools[pool].keys, offered_at)

    async def _continue(self, key: ObjectKey, plan: Plan) -> Rollout:
        """Where the last leader was, by what it stored and by what it reported."""
        pool = plan.pools[key]
        stored = await self._store.read(key, pool.keys)
        reported = pool.observed.status.revision or 0
        is_latest = stored.revision >= reported
        return Rollout(self._epoch(), max(stored.revision, reported), stored.document if is_latest else None)
