"""Canary: a document that no pod of the pool enforces yet goes to one pod first, and to the others when that one is well.

Pure but for the clock that it is given. A pod that ends or falls ill when it is sent the document stops the rollout at once;
one that refuses it or falls silent does if a second one does so too, or there is none: so that a pod that lies cannot keep a
pool from its documents. A rollout that was stopped goes on with another document, or, after a pause that grows, is tried
again with one pod.
"""

from collections.abc import Callable, Iterable

from evenhand_operator.pod_report import PodReport
from evenhand_policy.status import PodState
from evenhand_policy.version import Version

_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 60.0, 600.0
_MOST_DOUBTS = 2
PATIENCE_SECONDS = 1.0  # with one pod; a pod that is lost must not keep the others waiting
_OF_THE_DOCUMENT = frozenset({"rejected", "mismatch"})  # other refusals are of the version or of whoever sends it


class Canary:
    """Of one pool, in one term.

    Args:
        clock: monotonic time in seconds.
        exists: whether there is a pod of that uid, be it that its process has just ended.

    Attributes:
        stopped: why the rollout does not go on; empty while it does.
    """

    def __init__(self, clock: Callable[[], float], exists: Callable[[str], bool]) -> None:
        self.stopped = ""
        self._clock = clock
        self._exists = exists
        self._proven = ""
        self._digest = ""
        self._version = Version(0, 0)
        self._chosen: PodReport | None = None
        self._chosen_at = 0.0
        self._doubts: dict[str, tuple[PodReport, str]] = {}
        self._passed_over: dict[str, PodReport] = {}  # as they stood then; one that stands otherwise may be chosen
        self._culprit = ""
        self._distrusted: set[str] = set()  # uids of pods that stopped what others were well with
        self._again_at = 0.0
        self._pause = _FIRST_PAUSE_SECONDS

    def is_proven(self, digest: str) -> bool:
        """Whether a pod is well with the document."""
        return digest == self._proven

    def admits(self, instance: str, digest: str) -> bool:
        """Whether the document may be sent to the pod now."""
        return digest == self._proven or (
            digest == self._digest and self._chosen is not None and self._chosen.pod.instance == instance
        )

    @property
    def is_waiting(self) -> bool:
        """Whether it waits for one pod; then it wants to `look` again after `PATIENCE_SECONDS`."""
        return self._chosen is not None

    def concerns(self, report: PodReport) -> bool:
        """Whether anything is to be decided now that this pod stands so; else there is no need to `look`."""
        if self._digest == self._proven:
            return False
        if report.is_well and report.digest == self._digest:
            return True
        return not self.stopped and (self._chosen is None or self._chosen.pod.instance == report.pod.instance)

    def look(self, digest: str, version: Version, reports: Iterable[PodReport]) -> None:
        """Take in where all pods stand, of which all are to enforce the document of that digest in that version."""
        if version != self._version:
            self._version, self._passed_over = version, {}
        if digest != self._digest:
            self._pause, self._culprit = _FIRST_PAUSE_SECONDS, ""
            self._begin(digest)
        if digest == self._proven:
            return
        by_instance = {report.pod.instance: report for report in reports}
        if any(report.is_well and report.digest == digest for report in by_instance.values()):
            if self._culprit:
                self._distrusted.add(self._culprit)
            self._begin(digest)
            self._proven, self._culprit = digest, ""
            return
        if self.stopped:
            if self._clock() < self._again_at and self._exists(self._culprit):
                return
            self._begin(digest)
        if self._chosen is not None:
            self._judge(self._chosen, by_instance)
        if self._chosen is None and not self.stopped:
            self._choose(by_instance.values())

    def _begin(self, digest: str) -> None:
        self._digest, self._chosen, self.stopped = digest, None, ""
        self._doubts, self._passed_over = {}, {}

    def _judge(self, before: PodReport, reports: dict[str, PodReport]) -> None:
        """What has become of the chosen one since it was last looked at."""
        now = self._chosen = reports.get(before.pod.instance)
        was_sent = before.sent == self._digest
        if now is None:  # it was deleted, or its container has ended
            if was_sent and self._exists(before.pod.uid):
                self._stop(before, "ended when it was sent the document")
        elif was_sent and before.boot_id and now.boot_id != before.boot_id:
            self._stop(before, "ended when it was sent the document")
        elif now.state is PodState.UNREACHABLE:
            self._chosen = None
            if now.sent == self._digest and now.reason == "timeout":
                self._doubts[now.pod.instance] = now, "fell silent when it was sent the document"
            elif now.sent == self._digest:
                self._stop(now, "ended when it was sent the document")
        elif now.state is PodState.REJECTED and now.sent == self._digest:
            if now.reason == "ailing":
                self._stop(now, f"does not take the document: {now.message}")
            elif now.reason in _OF_THE_DOCUMENT:
                self._doubts[now.pod.instance] = now, f"does not take the document: {now.message}"
            else:
                self._passed_over[now.pod.instance] = now
            self._chosen = None
        elif now.state is PodState.REJECTED and now.outcome_of == self._version:
            self._passed_over[now.pod.instance] = now  # it cannot be asked, such as one that does not know our key yet
            self._chosen = None
        elif self._clock() - self._chosen_at >= PATIENCE_SECONDS:
            self._chosen = None
            if now.sent == self._digest:
                self._doubts[now.pod.instance] = now, "fell silent when it was sent the document"
            else:
                self._passed_over[now.pod.instance] = now

    def _choose(self, reports: Iterable[PodReport]) -> None:
        """The next one to try it with; where enough have not taken it, none."""
        if len(self._doubts) < _MOST_DOUBTS:
            self._chosen = min(filter(self._may_try, reports), key=self._preference, default=None)
            self._chosen_at = self._clock()
        if self._chosen is None and self._doubts:
            self._stop(*next(reversed(self._doubts.values())))

    def _may_try(self, report: PodReport) -> bool:
        instance = report.pod.instance
        is_tried = instance in self._doubts or self._passed_over.get(instance) == report
        return report.state is not PodState.UNREACHABLE and not is_tried

    def _stop(self, report: PodReport, what: str) -> None:
        self.stopped = f"pod {report.pod.name} {what}"
        self._culprit = report.pod.uid
        self._again_at = self._clock() + self._pause
        self._pause = min(2 * self._pause, _LONGEST_PAUSE_SECONDS)

    def _preference(self, report: PodReport) -> tuple[bool, bool, bool, str]:
        """One that never cried wolf, did well last time and serves, if there is one."""
        is_distrusted = report.pod.uid in self._distrusted or report.pod.uid == self._culprit
        return is_distrusted, report.state is not PodState.APPLIED, report.pod.ready_since is None, report.pod.name
