"""What the status of a policy and of a pool should say. Pure; kstatus and Flux read it as written here.

Ready is what tools wait for. Stalled means that nothing will change until somebody acts; what waits for an object that
may still come (a Secret, a pool) is not stalled.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from evenhand_operator.objects import EnginePod, write_time
from evenhand_operator.observed import ObservedPolicy, ObservedPool
from evenhand_operator.offer import Hold
from evenhand_operator.pod_report import PodReport
from evenhand_policy.errors import PolicyProblem, Reason
from evenhand_policy.status import (
    Condition,
    ConditionStatus,
    ConditionType,
    EnginePoolStatus,
    PodState,
    PodStatus,
    TenantPolicyStatus,
)
from evenhand_policy.version import Version

MAX_POD_ROWS = 1000
_MAX_MESSAGE_CHARACTERS = 4096
_MAX_POD_MESSAGE_CHARACTERS = 512
_NOTHING: Mapping[str, tuple[str, ...]] = MappingProxyType({})
_WAITS = frozenset({Reason.POOL_NOT_FOUND, Reason.NAMESPACE_UNKNOWN, Reason.SECRET_NOT_FOUND})
_FAILING = frozenset({PodState.REJECTED, PodState.UNREACHABLE})


class PoolState:
    """Where the pods of a pool stand.

    Args:
        pods: those that run.
        reports: of those that are being pushed to.
        current: version of the pool's current document.
        now: Unix time.
        grace: a pod that never answered counts once it has been ready for so many seconds.
        stopped: why the rollout of the current document does not go on; empty while it does.
        hold: what keeps a newer document back; None where nothing does.
        left_out: by uid of a tenant (empty: the pool) what of the document some pod does not understand.
    """

    def __init__(
        self,
        pods: Sequence[EnginePod],
        reports: Iterable[PodReport],
        current: Version,
        now: float,
        grace: float,
        *,
        stopped: str = "",
        hold: Hold | None = None,
        left_out: Mapping[str, tuple[str, ...]] = _NOTHING,
    ) -> None:
        by_instance = {report.pod.instance: report for report in reports}
        known_pods = [by_instance[pod.instance] for pod in pods if pod.instance in by_instance]
        ready = [report for report in known_pods if report.pod.ready_since is not None]
        self.current = current
        self.stopped = stopped
        self.hold = hold
        self.left_out = left_out
        self.num_ready = sum(pod.ready_since is not None for pod in pods)
        self.reports = [
            report for report in known_pods if report.pod.ready_since is not None or report.state is PodState.REJECTED
        ]
        self._ready = ready
        self._counted = [report for report in ready if _counts(report, now, grace)]
        self._enforced = [report.enforced for report in self._counted]
        known = [version for version in self._enforced if version is not None and version <= current]
        self._lowest = min(known) if len(known) == len(self._enforced) and known else None

    @property
    def num_applied(self) -> int:
        """Pods that enforce the current document."""
        return sum(report.enforced == self.current for report in self._ready)

    @property
    def has_counted(self) -> bool:
        """Whether there is any pod that a policy could be in force on."""
        return bool(self._counted)

    def is_everywhere(self, version: Version) -> bool:
        """Whether every pod enforces this version or a later one that this leader knows."""
        return self._lowest is not None and version <= self._lowest

    def is_failing(self, version: Version) -> bool:
        """Whether a pod that does not enforce this version has been told to and did not obey."""
        return any(
            report.state in _FAILING
            for report in self._counted
            if report.enforced is None or not version <= report.enforced <= self.current
        )


def _counts(report: PodReport, now: float, grace: float) -> bool:
    """A pod counts from its first answer on, so that a new one does not make every policy flap."""
    ready_since = report.pod.ready_since
    return report.enforced is not None or report.state is PodState.REJECTED or now - (ready_since or now) > grace


@dataclass(frozen=True, slots=True)
class Verdict:
    """What one condition says."""

    status: ConditionStatus
    reason: str
    message: str = ""


def policy_status(
    observed: ObservedPolicy,
    problems: Sequence[PolicyProblem],
    first: Version | None,
    programmed: Verdict,
    now: float,
    warning: str = "",
) -> TenantPolicyStatus:
    """Status of a policy; `first` is the first version that holds it, None where it has problems. `warning` is told
    where it has none."""
    is_programmed = programmed.status is ConditionStatus.TRUE
    return TenantPolicyStatus(
        conditions=_conditions(observed, observed.status.conditions, problems, programmed, now, warning),
        observed_generation=observed.generation,
        programmed_revision=_programmed_revision(observed, first) if is_programmed else None,
    )


def policy_programmed(
    observed: ObservedPolicy, problems: Sequence[PolicyProblem], first: Version | None, pool: PoolState | None
) -> Verdict:
    """Whether every ready pod of the pool enforces this generation of the policy."""
    if problems:
        return Verdict(ConditionStatus.FALSE, "NotAccepted", "The policy is not accepted, so no engine enforces it")
    where = "EnginePool {}/{}".format(*observed.policy.pool_key) if observed.policy else "its EnginePool"
    if first is None or pool is None:
        if pool is not None and pool.hold is not None:
            return Verdict(ConditionStatus.FALSE, pool.hold.reason, f"{where}: {pool.hold.message}")
        return Verdict(ConditionStatus.FALSE, "Pending", f"Not yet in the document of {where}")
    if paths := pool.left_out.get(observed.uid):
        advice = f"Some engine of {where} does not understand {', '.join(paths)}: upgrade the engines"
        return Verdict(ConditionStatus.FALSE, "NotUnderstood", advice)
    if not pool.has_counted and (not pool.num_ready or observed.is_programmed):
        what = "ready pods have just started, and not answered yet" if pool.num_ready else "no ready pod"
        return Verdict(ConditionStatus.TRUE, "NoPods", f"{where}: {what}; new ones will enforce it")
    if pool.is_everywhere(first):
        return Verdict(ConditionStatus.TRUE, "Programmed", "Every ready engine pod enforces this generation")
    if pool.stopped:
        return Verdict(ConditionStatus.FALSE, "RolloutStopped", f"{where}: {pool.stopped}"[:_MAX_MESSAGE_CHARACTERS])
    if pool.is_failing(first):
        advice = f"Some ready pods do not enforce this generation; the status of {where} tells which, and why"
        return Verdict(ConditionStatus.FALSE, "PartiallyProgrammed", advice)
    return Verdict(ConditionStatus.FALSE, "Pending", f"The pods of {where} are being told")


def _programmed_revision(observed: ObservedPolicy, first: Version | None) -> int | None:
    """What an earlier leader wrote stays, where this one knows no better."""
    return first[1] if first and first[1] else observed.status.programmed_revision


def pool_status(
    observed: ObservedPool,
    problems: Sequence[PolicyProblem],
    num_tenants: int,
    pool: PoolState | None,
    now: float,
    warning: str = "",
) -> EnginePoolStatus:
    """Status of a pool; `pool` is None where it cannot be read. `warning` is told where it has no problem."""
    if pool is None:
        programmed = Verdict(ConditionStatus.FALSE, "NotAccepted", "The pool cannot be read")
        conditions = _conditions(observed, observed.status.conditions, problems, programmed, now)
        return EnginePoolStatus(conditions=conditions, observed_generation=observed.generation)
    return EnginePoolStatus(
        conditions=_conditions(observed, observed.status.conditions, problems, _pool_programmed(pool), now, warning),
        observed_generation=observed.generation,
        epoch=pool.current[0],
        revision=pool.current[1],
        tenants=num_tenants,
        desired_pods=pool.num_ready,
        applied_pods=pool.num_applied,
        applied=f"{pool.num_applied}/{pool.num_ready}",
        pods=tuple(_pod_row(report) for report in sorted(pool.reports, key=_row_order)[:MAX_POD_ROWS]),
    )


def _pool_programmed(pool: PoolState) -> Verdict:
    if pool.hold is not None:
        return Verdict(ConditionStatus.FALSE, pool.hold.reason, pool.hold.message)
    if not pool.num_ready:
        return Verdict(ConditionStatus.FALSE, "NoPods", "No pod is ready; new ones will enforce the current document")
    if pool.num_applied == pool.num_ready:
        message = "Every ready pod enforces the current document"
        if paths := sorted({path for paths in pool.left_out.values() for path in paths}):
            message += f"; left out, since some do not understand it: {', '.join(paths)}"
        return Verdict(ConditionStatus.TRUE, "Programmed", message[:_MAX_MESSAGE_CHARACTERS])
    if pool.stopped:
        return Verdict(ConditionStatus.FALSE, "RolloutStopped", pool.stopped[:_MAX_MESSAGE_CHARACTERS])
    if pool.is_failing(pool.current):
        advice = "Some ready pods do not enforce the current document; status.pods tells which, and why"
        return Verdict(ConditionStatus.FALSE, "PartiallyProgrammed", advice)
    return Verdict(ConditionStatus.FALSE, "Pending", "The pods are being told")


def _row_order(report: PodReport) -> tuple[bool, str]:
    """Failing pods first, so that they are shown however many there are."""
    return report.state not in _FAILING, report.pod.name


def _pod_row(report: PodReport) -> PodStatus:
    epoch, revision = report.enforced or (None, None)
    return PodStatus(
        name=report.pod.name,
        boot_id=report.boot_id or None,
        epoch=epoch,
        revision=revision,
        state=report.state,
        message=report.message[:_MAX_POD_MESSAGE_CHARACTERS] or None,
        since=write_time(report.since),
        backend=report.backend or None,
    )


def _accepted(observed: ObservedPolicy | ObservedPool, problems: Sequence[PolicyProblem], warning: str) -> Verdict:
    if not problems:
        message = "The object is valid and has what it claims"
        if observed.ignored:
            message += "; ignored, since only a newer operator knows it: " + ", ".join(observed.ignored)
        if warning:
            message += f"; {warning}"
        return Verdict(ConditionStatus.TRUE, "Accepted", message[:_MAX_MESSAGE_CHARACTERS])
    texts = (f"{problem.path}: {problem.message}" if problem.path else problem.message for problem in problems)
    return Verdict(ConditionStatus.FALSE, str(problems[0].reason), "; ".join(texts)[:_MAX_MESSAGE_CHARACTERS])


def _conditions(
    observed: ObservedPolicy | ObservedPool,
    before: Iterable[Condition],
    problems: Sequence[PolicyProblem],
    programmed: Verdict,
    now: float,
    warning: str = "",
) -> tuple[Condition, ...]:
    """All four; a condition whose status stays the same keeps the time of its last transition."""
    accepted = _accepted(observed, problems, warning)
    verdicts = {
        ConditionType.ACCEPTED: accepted,
        ConditionType.PROGRAMMED: programmed,
        ConditionType.READY: _ready(accepted, programmed),
        ConditionType.STALLED: _stalled(problems),
    }
    earlier = {condition.type: condition for condition in before}
    return tuple(
        Condition(
            type=kind,
            status=verdict.status,
            observed_generation=observed.generation,
            last_transition_time=_transition_time(earlier.get(kind), verdict, now),
            reason=verdict.reason,
            message=verdict.message,
        )
        for kind, verdict in verdicts.items()
    )


def _ready(accepted: Verdict, programmed: Verdict) -> Verdict:
    for verdict in (accepted, programmed):
        if verdict.status is not ConditionStatus.TRUE:
            return Verdict(ConditionStatus.FALSE, verdict.reason, verdict.message)
    return Verdict(ConditionStatus.TRUE, "Ready", "Accepted, and enforced by every ready engine pod")


def _stalled(problems: Sequence[PolicyProblem]) -> Verdict:
    """Only what waiting cannot cure."""
    for problem in problems:
        if problem.reason not in _WAITS:
            return Verdict(ConditionStatus.TRUE, str(problem.reason), "Nothing will change until somebody acts")
    return Verdict(ConditionStatus.FALSE, "NotStalled", "")


def _transition_time(before: Condition | None, verdict: Verdict, now: float) -> str:
    if before is not None and before.status is verdict.status:
        return before.last_transition_time
    return write_time(now)
