"""PodLink: brings one pod to what its pool offers, and keeps it there."""

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import dataclass, replace

from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type

from evenhand_operator import metrics
from evenhand_operator.canary import Canary
from evenhand_operator.clock import Clock
from evenhand_operator.engine_client import EngineClient, PushError
from evenhand_operator.objects import EnginePod
from evenhand_operator.offer import Offer
from evenhand_operator.pod_report import PodReport
from evenhand_policy.push_document import members_known_by
from evenhand_policy.push_protocol import EngineReport
from evenhand_policy.status import PodState

VERIFY_SECONDS = 45.0
FIRST_BACKOFF_SECONDS = 0.25
LONGEST_BACKOFF_SECONDS = 15.0
STARTING_BACKOFF_SECONDS = 1.0
_MOST_DOUBLINGS = 10
TRIAL_SECONDS = 0.1
LONGEST_TRIAL_SECONDS = 3.0


@dataclass(frozen=True, slots=True)
class Lanes:
    """Bounds on how many pods are talked to at once: those that answered last time, those that are new, and those that
    did not answer, who may hang."""

    proven: asyncio.Semaphore
    new: asyncio.Semaphore
    lost: asyncio.Semaphore

    def of(self, report: PodReport) -> asyncio.Semaphore:
        """The lane of a pod that stands so."""
        if report.state is PodState.UNREACHABLE:
            return self.lost
        return self.proven if report.boot_id else self.new


class PodLink:
    """One pod, one task, at most one request at a time; always the newest offer.

    `notify` is called with the link after every change of `report`.
    """

    def __init__(
        self,
        report: PodReport,
        offer: Offer,
        client: EngineClient,
        canary: Canary,
        lanes: Lanes,
        notify: Callable[["PodLink"], None],
        tasks: asyncio.TaskGroup,
        clock: Clock,
    ) -> None:
        self.report = report
        self._offer = offer
        self._client = client
        self._canary = canary
        self._lanes = lanes
        self._notify = notify
        self._clock = clock
        self._known: EngineReport | None = None  # by the last answer of a process that proved to be in this pod
        self._woken = asyncio.Event()
        self._task = tasks.create_task(self._run(), name=f"push to {report.pod.name}")

    @property
    def is_settled(self) -> bool:
        """Whether an attempt with the newest offer has come to an end."""
        return self.report.outcome_of == self._offer.version

    @property
    def is_applied(self) -> bool:
        """Whether the pod enforces the newest offer."""
        return self.is_settled and self.report.state is PodState.APPLIED

    def offer(self, offer: Offer) -> None:
        """From now on the pod is to enforce this."""
        if offer.version != self._offer.version:
            self._offer = offer
            self._woken.set()

    def follow(self, pod: EnginePod) -> None:
        """The pod as it is now: whether it is ready, and where it can be reached, may be another."""
        if pod != self.report.pod:
            moved = pod.url != self.report.pod.url
            self.report = replace(self.report, pod=pod)
            if moved:
                self._known = None
                self._woken.set()

    def wake(self) -> None:
        """What the pod may be sent is another."""
        self._woken.set()

    def close(self) -> None:
        """Ends the task."""
        self._task.cancel()

    async def _run(self) -> None:
        """Push until the newest offer is in force, then see to it that it stays so, for ever."""
        retrying = AsyncRetrying(retry=retry_if_exception_type(PushError), wait=self._backoff, sleep=self._pause)
        while True:
            await retrying(self._push)
            await self._wait_until_due()

    async def _push(self) -> None:
        async with self._lanes.of(self.report):
            self._woken.clear()
            offer = self._offer  # the newest, after the wait for a place in the lane
            try:
                report = await self._bring_to(offer)
            except PushError as error:
                metrics.PUSH_ERRORS.labels(error.reason).inc()
                self._known = None
                self._record(error.state, offer, error.report, error)
                raise
            except _Waits:
                return
        metrics.PUSH_SECONDS.observe(self._clock.monotonic() - offer.offered_at)
        self._record(PodState.APPLIED, offer, report)

    async def _bring_to(self, offer: Offer) -> EngineReport:
        """Ask where the pod is, where that is not known; then tell it no more than it lacks."""
        pod = self.report.pod
        if self._known is None:
            self._learn(await self._client.read(pod, offer))
        known, digest = self._known, offer.document.digest
        assert known
        if known.digest == digest:
            if known.assignment != offer.assignment:
                known = self._known = await self._client.relabel(pod, offer, known.boot_id)
            is_trusted = self._canary.is_proven(digest) or self.report.is_well
            return known if is_trusted else await self._watch_over(offer, known.boot_id)
        understands = self.report.understands
        if understands is not None and not offer.document.members <= understands:
            raise _Waits  # for a document that it understands
        if not self._canary.admits(pod.instance, digest):
            raise _Waits
        self._change(replace(self.report, sent=digest))
        known = self._known = await self._client.send(pod, offer, known.boot_id)
        return known if self._canary.is_proven(digest) else await self._watch_over(offer, known.boot_id)

    async def _watch_over(self, offer: Offer, boot_id: str) -> EngineReport:
        """The first pod with a new document: is it still there, and well, after a moment?"""
        deadline = self._clock.monotonic() + LONGEST_TRIAL_SECONDS
        while True:
            await asyncio.sleep(TRIAL_SECONDS)
            report = await self._client.read(self.report.pod, offer)
            if report.boot_id != boot_id:
                raise PushError(PodState.UNREACHABLE, "restarted", "another process answers than before", report)
            if not report.ailment and report.assignment == offer.assignment:
                self._known = report
                return report
            if self._clock.monotonic() > deadline:
                raise PushError(PodState.REJECTED, "ailing", f"it is not well: {report.ailment}", report)

    def _learn(self, report: EngineReport) -> None:
        """What is known before it is told anything: that it can be reached, and where it stands."""
        self._known = report
        before = self.report
        if before.state is PodState.UNREACHABLE:
            before = replace(before, state=PodState.PENDING, message="", reason="", since=self._clock.wall())
        self._change(
            replace(
                before,
                boot_id=report.boot_id,
                backend=report.backend,
                enforced=report.assignment.version,
                digest=report.digest,
                is_well=not report.ailment,
                understands=members_known_by(report.understands) if report.understands else None,
            )
        )

    async def _wait_until_due(self) -> None:
        """Returns when there is a newer offer, or the pod, asked from time to time, enforces something else."""
        while True:
            await self._pause(self._clock.spread(VERIFY_SECONDS))
            if self._woken.is_set():
                return
            if not self.is_applied:
                return
            try:
                async with self._lanes.proven:
                    report = await self._client.read(self.report.pod, self._offer)
            except PushError:
                self._known = None
                return  # the push that follows tells what is wrong
            self._learn(report)
            if report.assignment != self._offer.assignment:
                return
            self._record(PodState.APPLIED, self._offer, report)

    def _record(
        self, state: PodState, offer: Offer, report: EngineReport | None, error: PushError | None = None
    ) -> None:
        before = self.report
        recorded = replace(
            before,
            state=state,
            message=error.message if error else "",
            reason=error.reason if error else "",
            since=before.since if state is before.state else self._clock.wall(),
            boot_id=report.boot_id if report else before.boot_id,
            backend=report.backend if report else before.backend,
            enforced=report.assignment.version if report else before.enforced,
            digest=report.digest if report else before.digest,
            is_well=report is not None and not report.ailment,
            outcome_of=offer.version,
        )
        self._change(recorded)

    def _change(self, report: PodReport) -> None:
        before, self.report = self.report, report
        if report != before:
            self._notify(self)

    def _backoff(self, state: RetryCallState) -> float:
        """A pod that starts is not waited for long: until it is told what to enforce, it does not serve."""
        is_starting = self.report.pod.ready_since is None
        longest = STARTING_BACKOFF_SECONDS if is_starting else LONGEST_BACKOFF_SECONDS
        doubled = FIRST_BACKOFF_SECONDS * 2.0 ** min(state.attempt_number - 1, _MOST_DOUBLINGS)
        return self._clock.chance() * min(doubled, longest)

    async def _pause(self, seconds: float) -> None:
        """Sleep, but not past a newer offer."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._woken.wait()


class _Waits(Exception):
    """There is something to send that may not be sent yet; `wake` tells when."""
