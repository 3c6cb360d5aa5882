"""PodLink: brings one pod to what its pool offers, and keeps it there."""

import asyncio
import contextlib
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

from tenacity import AsyncRetrying, retry_if_exception_type, wait_random_exponential

from evenhand_operator import metrics
from evenhand_operator.engine_client import EngineClient, Offer, PushError
from evenhand_operator.objects import EnginePod
from evenhand_policy.push_protocol import EngineReport
from evenhand_policy.status import PodState

VERIFY_SECONDS = 45.0
FIRST_BACKOFF_SECONDS = 0.25
LONGEST_BACKOFF_SECONDS = 15.0

Version = tuple[int, int]
"""Epoch and revision."""


@dataclass(frozen=True, slots=True)
class PodReport:
    """Where a pod stands.

    Attributes:
        pod: the pod.
        state: as in the pool's status.
        message: why it is not Applied.
        reason: the same in one word, as in metrics; empty where there is nothing wrong.
        since: Unix time at which the state last changed.
        boot_id: of the engine process, by its own last answer; empty where it never answered.
        enforced: version of the document in force there, by its own last answer or what an earlier leader wrote.
        outcome_of: the offer of which `state` tells the outcome; None while no attempt has come to an end.
    """

    pod: EnginePod
    state: PodState
    since: float
    message: str = ""
    reason: str = ""
    boot_id: str = ""
    enforced: Version | None = None
    outcome_of: Offer | None = None


class Lanes(NamedTuple):
    """Bounds on how many pods are talked to at once: those that answered last time, and the others, who may hang."""

    proven: asyncio.Semaphore
    unproven: asyncio.Semaphore


class PodLink:
    """One pod, one task, at most one request at a time; always the newest offer.

    `notify` is called with `report` after every change of it.
    """

    def __init__(
        self,
        report: PodReport,
        offer: Offer,
        client: EngineClient,
        lanes: Lanes,
        notify: Callable[[PodReport], None],
        tasks: asyncio.TaskGroup,
    ) -> None:
        self.report = report
        self._offer = offer
        self._client = client
        self._lanes = lanes
        self._notify = notify
        self._woken = asyncio.Event()
        self._task = tasks.create_task(self._run(), name=f"push to {report.pod.name}")

    @property
    def is_settled(self) -> bool:
        """Whether an attempt with the newest offer has come to an end."""
        return self.report.outcome_of == self._offer

    @property
    def is_applied(self) -> bool:
        """Whether the pod enforces the newest offer."""
        return self.is_settled and self.report.state is PodState.APPLIED

    def offer(self, offer: Offer) -> None:
        """From now on the pod is to enforce this."""
        if offer != self._offer:
            self._offer = offer
            self._woken.set()

    def close(self) -> None:
        """Ends the task."""
        self._task.cancel()

    async def _run(self) -> None:
        """Push until the newest offer is in force, then see to it that it stays so, for ever."""
        retrying = AsyncRetrying(
            retry=retry_if_exception_type(PushError),
            wait=wait_random_exponential(multiplier=FIRST_BACKOFF_SECONDS, max=LONGEST_BACKOFF_SECONDS),
            sleep=self._pause,
        )
        while True:
            await retrying(self._push)
            await self._wait_until_due()

    async def _push(self) -> None:
        is_proven = self.report.state is not PodState.UNREACHABLE and self.report.enforced is not None
        async with self._lanes.proven if is_proven else self._lanes.unproven:
            self._woken.clear()
            offer = self._offer  # the newest, after the wait for a place in the lane
            try:
                report = await self._client.push(self.report.pod.url, offer)
            except PushError as error:
                metrics.PUSH_ERRORS.labels(error.reason).inc()
                self._record(error.state, offer, error.report, error)
                raise
        metrics.PUSH_SECONDS.observe(time.monotonic() - offer.offered_at)
        self._record(PodState.APPLIED, offer, report)

    async def _wait_until_due(self) -> None:
        """Returns when there is a newer offer, or the pod, asked from time to time, enforces something else."""
        while True:
            await self._pause(VERIFY_SECONDS * random.uniform(0.8, 1.2))
            if self._woken.is_set():
                return
            try:
                async with self._lanes.proven:
                    report = await self._client.read(self.report.pod.url, self._offer)
            except PushError:
                return  # the push that follows tells what is wrong
            if (report.epoch, report.revision, report.digest) != (*self._offer.version, self._offer.digest):
                return
            self._record(PodState.APPLIED, self._offer, report)

    def _record(
        self, state: PodState, offer: Offer, report: EngineReport | None, error: PushError | None = None
    ) -> None:
        before = self.report
        self.report = replace(
            before,
            state=state,
            message=error.message if error else "",
            reason=error.reason if error else "",
            since=before.since if state is before.state else time.time(),
            boot_id=report.boot_id if report else before.boot_id,
            enforced=(report.epoch, report.revision) if report else before.enforced,
            outcome_of=offer,
        )
        if self.report != before:
            self._notify(self.report)

    async def _pause(self, seconds: float) -> None:
        """Sleep, but not past a newer offer."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._woken.wait()
