"""Reporter: which statuses should be other than they are, and the loop that makes them so."""

import asyncio
import contextlib
from collections.abc import Iterator

from msgspec.structs import replace

from evenhand_operator.cache import Cache
from evenhand_operator.clock import SYSTEM_CLOCK, Clock
from evenhand_operator.conditions import PoolState, Verdict, policy_programmed, policy_status, pool_status
from evenhand_operator.documents import Documents
from evenhand_operator.foreign import is_foreign
from evenhand_operator.objects import ObjectKey
from evenhand_operator.observed import ObservedPolicy, ObservedPool
from evenhand_operator.pusher import Pusher
from evenhand_operator.settings import Settings
from evenhand_operator.signals import Signals
from evenhand_operator.status_writer import StatusChange, StatusWriter
from evenhand_policy.errors import PolicyProblem
from evenhand_policy.version import Version

_LOOK_SECONDS = 2.0  # what depends on time alone, such as the grace of new pods and writes that failed
_MAX_BATCH = 256  # then it is looked again at what is most urgent

_Basis = tuple[ObservedPolicy, tuple[PolicyProblem, ...], Version | None, Verdict, str]


class Reporter:
    """Remembers on what each policy's status was last based, so that only what has changed is looked at again.

    Args:
        caught_up: until it is set only the most urgent statuses are written: changes are not seen before Kopf has
            listed everything, and thousands of writes would keep it from that.
        installation: whose the pools are that are reported of.

    Attributes:
        num_due: statuses that are to be written.
    """

    def __init__(
        self,
        cache: Cache,
        signals: Signals,
        documents: Documents,
        pusher: Pusher,
        writer: StatusWriter,
        settings: Settings,
        caught_up: asyncio.Event,
        installation: str,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        self._clock = clock
        self._cache = cache
        self._signals = signals
        self._documents = documents
        self._pusher = pusher
        self._writer = writer
        self._settings = settings
        self._caught_up = caught_up
        self._installation = installation
        self.num_due = 0
        self._answered = asyncio.Event()
        self._right: dict[str, _Basis] = {}

    def pod_answered(self) -> None:
        """A pod has answered, or failed to."""
        self._answered.set()
        self._signals.statuses.signal()

    async def run(self) -> None:
        """Keep all statuses right."""
        while True:
            await self._signals.statuses.wait(timeout=_LOOK_SECONDS)
            await self._settle()
            changes, num_later = self.changes(self._clock.wall())
            self.num_due = len(changes) + num_later
            await self._writer.write(changes)
            self.num_due = num_later
            if num_later:
                await self._caught_up.wait()
                self._signals.statuses.signal()

    async def _settle(self) -> None:
        """Wait for the pods' answers, but not long: then a change is reported once, and not first as pending."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._settings.settle_seconds):
                while not all(map(self._pusher.is_settled, self._documents.plan.pools)):
                    self._answered.clear()
                    await self._answered.wait()

    def changes(self, now: float) -> tuple[list[StatusChange], int]:
        """The most urgent statuses that are not as they should be at Unix time `now`, and how many policies were not
        looked at: with thousands at once, it would cost more to work out all of their statuses than to write some."""
        states = {key: self._pool_state(key, now) for key in self._documents.plan.pools}
        changes = list(self._pool_changes(states, now))
        due = sorted(self._due_policies(states), key=lambda basis: _is_observed(basis[0]))
        for index, basis in enumerate(due):
            if len(changes) >= _MAX_BATCH:
                return changes, len(due) - index
            change = StatusChange(basis[0], policy_status(*basis[:4], now, basis[4]))
            if self._writer.is_due(change):
                changes.append(change)
            elif not change.is_needed:
                self._right[basis[0].uid] = basis
        return changes, 0

    def _pool_state(self, key: ObjectKey, now: float) -> PoolState:
        made = self._documents.offers.get(key)
        return PoolState(
            made.pods if made else (),
            self._pusher.reports(key),
            self._documents.rollout(key).version,
            now,
            self._settings.new_pod_grace_seconds,
            stopped=self._pusher.stopped(key),
            hold=made.hold if made else None,
            left_out=made.left_out if made else {},
        )

    def _pool_changes(self, states: dict[ObjectKey, PoolState], now: float) -> Iterator[StatusChange]:
        plan = self._documents.plan
        for observed in self._cache.pools:
            planned = plan.pools.get(observed.key)
            if is_foreign(observed, self._installation):
                continue
            if not _is_up_to_date(observed, planned.observed if planned else None):
                continue
            problems = plan.problems.get(observed.reference, ())
            if overlap := self._documents.overlaps.get(observed.reference):
                problems = (*problems, overlap)
            num_tenants = len(planned.config.tenants) if planned else 0
            status = pool_status(
                observed,
                problems,
                num_tenants,
                states.get(observed.key),
                now,
                plan.warnings.get(observed.reference, ""),
            )
            status = replace(status, operator=self._installation)
            if self._writer.is_due(change := StatusChange(observed, status)):
                yield change

    def _due_policies(self, states: dict[ObjectKey, PoolState]) -> Iterator[_Basis]:
        """Policies whose statuses are based on something else than when they were last found right."""
        known, self._right = self._right, {}
        for observed in self._cache.policies:
            compiled = self._documents.policies.get(observed.uid)
            if compiled is None or compiled.request != observed.request:
                continue  # it is about to be compiled
            basis = self._basis(observed, states)
            if (before := known.get(observed.uid)) and before[0] is observed and before[1:] == basis[1:]:
                self._right[observed.uid] = before
            else:
                yield basis

    def _basis(self, observed: ObservedPolicy, states: dict[ObjectKey, PoolState]) -> _Basis:
        problems = self._documents.plan.problems.get(observed.reference, ())
        key = observed.policy.pool_key if observed.policy else None
        first, state = None, None
        if not problems and key in states:
            first, state = self._documents.rollout(key).first_version(observed), states[key]
        warning = self._documents.plan.warnings.get(observed.reference, "")
        return observed, problems, first, policy_programmed(observed, problems, first, state), warning


def _is_observed(policy: ObservedPolicy) -> bool:
    """Whether its status tells of its present generation, if perhaps not the latest."""
    return policy.status.observed_generation == policy.generation


def _is_up_to_date(observed: ObservedPool, compiled: ObservedPool | None) -> bool:
    """Whether the plan was made of the pool as it is now."""
    return observed.pool is None or (compiled is not None and compiled.request == observed.request)
