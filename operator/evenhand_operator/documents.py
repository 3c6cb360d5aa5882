"""Documents: what every pool's engines are to enforce, and what came of every policy when it was last compiled."""

import asyncio
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from typing import NamedTuple

from evenhand_operator.assignment import assign_pods
from evenhand_operator.bootstrap_store import BootstrapStore
from evenhand_operator.objects import EnginePod, ObjectKey
from evenhand_operator.observed import ObservedPolicy
from evenhand_operator.offer import Hold, HoldReason, Offer
from evenhand_operator.reconcile import Plan, PoolPlan, World, close_pool, make_plan
from evenhand_operator.rollout import Rollout, Stored
from evenhand_policy.bootstrap import DocumentTooLargeError, check_size
from evenhand_policy.compact import Members
from evenhand_policy.config import PoolReference, SchedulerConfig
from evenhand_policy.errors import PolicyProblem, ResourceReference
from evenhand_policy.pool import OnDeletion
from evenhand_policy.push_document import Document, encode_document, understood_members


class PoolOffer(NamedTuple):
    """What one build made of one pool, read by pusher, store and reporter alike.

    Attributes:
        offer: what its pods are to enforce; None where its first document is too large, or it is paused and what it
            had is not known any more.
        pods: those that it selects and that run, by name.
        hold: what keeps a newer document back; None where nothing does.
        left_out: by uid of a tenant (empty: the document as a whole) what some pod does not understand.
    """

    offer: Offer | None
    pods: tuple[EnginePod, ...]
    hold: Hold | None
    left_out: Mapping[str, tuple[str, ...]]


class Documents:
    """One leader's documents. What was compiled is seen with the offers that are made of it, and not before.

    Attributes:
        plan: what the offers are made of; empty before the first time.
        policies: by uid, as they were compiled.
        offers: of each pool that has a plan.
        overlaps: problems of pools of whose pods others have some.
    """

    def __init__(self, store: BootstrapStore, epoch: Callable[[], int]) -> None:
        self.plan = Plan({}, {})
        self.policies: Mapping[str, ObservedPolicy] = {}
        self.offers: dict[ObjectKey, PoolOffer] = {}
        self.overlaps: Mapping[ResourceReference, PolicyProblem] = {}
        self._store = store
        self._epoch = epoch
        self._compiled = self.plan, self.policies
        self._rollouts: dict[ObjectKey, Rollout] = {}  # of pools that are gone too: theirs may come back
        self._encoded: dict[ObjectKey, tuple[SchedulerConfig, Members, Document]] = {}

    async def rebuild(self, world: World, existing: Set[ObjectKey]) -> None:
        """Compile everything. Raises ApiError where what an earlier leader stored cannot be read; nothing changes.

        `existing` are the pools that were not deleted, be they in `world` or not.
        """
        plan = await asyncio.to_thread(make_plan, world)
        closed = {
            key: close_pool(pool)
            for key, pool in self._compiled[0].pools.items()
            if key not in existing and pool.pool.spec.on_deletion is OnDeletion.CLOSE
        }
        plan = Plan({**plan.pools, **closed}, plan.problems, plan.warnings)
        for key in plan.pools.keys() - self._rollouts.keys():
            self._rollouts[key] = await self._continue(plan.pools[key])
        self._compiled = plan, {observed.uid: observed for observed in world.policies}

    async def offer(
        self,
        pods: Iterable[EnginePod],
        understood: Callable[[ObjectKey, Sequence[EnginePod]], Members],
        offered_at: float,
    ) -> None:
        """Make the offers to these pods. `understood`: what those of a pool are known to understand."""
        plan, policies = self._compiled
        running = (pod for pod in pods if pod.is_running)
        assigned, overlaps = assign_pods((each.pool for each in plan.pools.values()), running)
        offers = {
            key: await self._offer(each, policies, assigned[key], understood(key, assigned[key]), offered_at)
            for key, each in plan.pools.items()
        }
        for key in self._encoded.keys() - offers.keys():
            del self._encoded[key]
        self.plan, self.policies, self.overlaps, self.offers = plan, policies, overlaps, offers

    def rollout(self, pool: ObjectKey) -> Rollout:
        """Of a pool that has a plan."""
        return self._rollouts[pool]

    async def _offer(
        self,
        plan: PoolPlan,
        policies: Mapping[str, ObservedPolicy],
        pods: tuple[EnginePod, ...],
        understood: Members,
        offered_at: float,
    ) -> PoolOffer:
        key, rollout = plan.observed.key, self._rollouts[plan.observed.key]
        config, document = plan.config, await self._encode(plan, understood)
        hold = _hold(plan, rollout, document)
        if hold is not None:
            if rollout.config is None or rollout.document is None:
                return PoolOffer(None, pods, hold, {})
            config, document = rollout.config, rollout.document
        num_ready = sum(pod.ready_since is not None for pod in pods)
        rollout.advance(config, document, max(1, num_ready), policies)
        offer = Offer(
            cluster=config.cluster,
            pool=PoolReference(namespace=key[0], name=key[1]),
            document=document,
            version=rollout.version,
            num_replicas=rollout.num_replicas,
            offered_at=offered_at,
        )
        return PoolOffer(offer, pods, hold, _left_out(config, document))

    async def _encode(self, plan: PoolPlan, understood: Members) -> Document:
        known = self._encoded.get(plan.observed.key)
        if known is None or known[0] is not plan.config or known[1] != understood:
            if known is not None and known[1] == understood and known[0] == plan.config:
                document = known[2]
            else:
                document = await asyncio.to_thread(encode_document, plan.config, understood)
            known = self._encoded[plan.observed.key] = (plan.config, understood, document)
        return known[2]

    async def _continue(self, plan: PoolPlan) -> Rollout:
        """Where the last leader was, by what it stored and by what it reported."""
        stored = await self._store.read(plan.observed)
        reported = plan.observed.status.revision or 0
        return Rollout(self._epoch(), stored if stored.revision >= reported else Stored(reported))


def _hold(plan: PoolPlan, rollout: Rollout, document: Document) -> Hold | None:
    """Whether the document may not take the place of what is rolled out."""
    try:
        check_size(document)
    except DocumentTooLargeError as error:
        return Hold(HoldReason.DOCUMENT_TOO_LARGE, f"{error}; what is in force stays: use several pools")
    is_first = rollout.document is None and rollout.version.revision == 0
    is_current = rollout.document is not None and rollout.document.digest == document.digest
    if plan.pool.spec.paused and not is_first and not is_current:
        return Hold(HoldReason.PAUSED, "The pool is paused: what its engines enforce stays as it is")
    return None


def all_understand(reported: Iterable[Members | None]) -> Members:
    """What every one of these pods and this operator understand; of one that has not said, nothing is taken away."""
    common = understood_members()
    for members in {each for each in reported if each is not None}:
        common &= members
    return common


def _left_out(config: SchedulerConfig, document: Document) -> Mapping[str, tuple[str, ...]]:
    found: dict[str, set[str]] = defaultdict(set)
    for loss in document.losses:
        is_tenant = loss.place is not None and loss.path.startswith("tenants.")
        found[config.tenants[loss.place].uid if is_tenant and loss.place is not None else ""].add(loss.path)
    return {uid: tuple(sorted(paths)) for uid, paths in found.items()}
