"""Kubernetes Events about transitions of conditions: what a user reads in `kubectl describe`."""

import asyncio
import logging
import secrets
from collections.abc import Iterable
from typing import NamedTuple

from evenhand_operator.clock import SYSTEM_CLOCK, Clock
from evenhand_operator.kube import FIELD_MANAGER, ApiError, KubeClient
from evenhand_operator.objects import Json, write_time
from evenhand_operator.observed import Observed
from evenhand_operator.resources import EVENTS, TENANT_POLICIES
from evenhand_policy.status import Condition, ConditionStatus, ConditionType

log = logging.getLogger(__name__)

_BURST, _PER_SECOND = 50.0, 5.0
_MAX_MESSAGE_CHARACTERS = 1000
_PREFIX_CHARACTERS = 200
_TOLD = (ConditionType.ACCEPTED, ConditionType.PROGRAMMED)
_PASSING = frozenset({"Pending", "NotAccepted", "NoPods"})


class Transition(NamedTuple):
    """Something that happened to an object."""

    is_warning: bool
    reason: str
    message: str


def transitions(before: Iterable[Condition], after: Iterable[Condition]) -> list[Transition]:
    """What a change of conditions tells: that something went wrong, how it changed, and that it is well again."""
    earlier = {condition.type: condition for condition in before}
    found = []
    for condition in after:
        old = earlier.get(condition.type)
        if condition.type not in _TOLD or condition.reason in _PASSING:
            continue
        was_wrong = old is not None and old.status is ConditionStatus.FALSE and old.reason not in _PASSING
        if condition.status is ConditionStatus.FALSE:
            if not was_wrong or (old and old.reason != condition.reason):
                found.append(Transition(True, condition.reason, condition.message))
        elif was_wrong:
            found.append(Transition(False, condition.reason, condition.message))
    return found


class EventRecorder:
    """Writes Events in the background, some a second; what is beyond that is dropped, since statuses tell it too."""

    def __init__(self, kube: KubeClient, tasks: asyncio.TaskGroup, clock: Clock = SYSTEM_CLOCK) -> None:
        self._kube = kube
        self._tasks = tasks
        self._clock = clock
        self._allowance = _BURST
        self._allowed_at = self._clock.monotonic()

    def record(self, observed: Observed, transition: Transition) -> None:
        """An Event about an object."""
        now = self._clock.monotonic()
        self._allowance = min(_BURST, self._allowance + (now - self._allowed_at) * _PER_SECOND)
        self._allowed_at = now
        if self._allowance < 1:
            return
        self._allowance -= 1
        self._tasks.create_task(self._send(_event(observed, transition, self._clock.wall())))

    async def _send(self, event: Json) -> None:
        try:
            await self._kube.create(EVENTS, event)
        except ApiError as error:
            log.info("an event was not written: %s", error)


def _event(observed: Observed, transition: Transition, at: float) -> Json:
    namespace, name = observed.key
    now = write_time(at)
    prefix = name[:_PREFIX_CHARACTERS].rstrip("-.")  # each part of a name has to end with a letter or digit
    return {
        "metadata": {"name": f"{prefix}.{secrets.token_hex(8)}", "namespace": namespace},
        "involvedObject": {
            "apiVersion": TENANT_POLICIES.api_version,
            "kind": observed.kind,
            "namespace": namespace,
            "name": name,
            "uid": observed.uid,
        },
        "type": "Warning" if transition.is_warning else "Normal",
        "reason": transition.reason,
        "message": transition.message[:_MAX_MESSAGE_CHARACTERS],
        "source": {"component": FIELD_MANAGER},
        "reportingComponent": FIELD_MANAGER,
        "reportingInstance": FIELD_MANAGER,
        "firstTimestamp": now,
        "lastTimestamp": now,
        "count": 1,
    }
