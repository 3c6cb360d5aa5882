"""What the operator has observed and decided, in few words: policies, pools, plans, reports of pods."""

from typing import Any

import msgspec

from evenhand_operator.conditions import PoolState
from evenhand_operator.objects import read_pod
from evenhand_operator.observed import ObservedPolicy, ObservedPool, read_policy, read_pool
from evenhand_operator.pod_report import PodReport
from evenhand_operator.reconcile import Plan, World, make_plan
from evenhand_policy.config import ServiceAccountIssuer
from evenhand_policy.decode import decode
from evenhand_policy.errors import Reason
from evenhand_policy.secret import Secret
from evenhand_policy.status import EnginePoolStatus, PodState, TenantPolicyStatus
from evenhand_policy.version import Version
from harness.builders import make_pod, make_policy, make_pool, make_secret

Json = dict[str, Any]
CURRENT = Version(2, 5)
NOW = 1_800_000_000.0
ISSUER = ServiceAccountIssuer(issuer="https://issuer", audience="evenhand", jwks={"keys": []})


def _meta(name: str, namespace: str = "inference", generation: int = 1, age: int = 0) -> Json:
    """Arguments of `make_meta`."""
    uid, created = f"uid-{namespace}-{name}", f"2026-01-01T00:00:{age:02d}Z"
    return {"namespace": namespace, "generation": generation, "creationTimestamp": created, "uid": uid}


def policy_object(name: str, *, status: Json | None = None, spec: Json | None = None, **meta: Any) -> Json:
    """A TenantPolicy; `meta` are generation and age in seconds."""
    return make_policy(name, meta=_meta(name, **meta), status=status or {}, **spec or {})


def pool_object(name: str = "default", *, status: Json | None = None, spec: Json | None = None, **meta: Any) -> Json:
    """An EnginePool."""
    return make_pool(name, meta=_meta(name, **meta), status=status or {}, **spec or {})


def policy(name: str, **changes: Any) -> ObservedPolicy:
    """The same as the operator observes it."""
    observed = read_policy(policy_object(name, **changes))
    assert observed is not None
    return observed


def pool(name: str = "default", **changes: Any) -> ObservedPool:
    """The same as the operator observes it."""
    observed = read_pool(pool_object(name, **changes))
    assert observed is not None
    return observed


def secret(name: str, *values: str, namespace: str = "inference") -> Secret:
    """A Secret with these values."""
    obj = make_secret(name, *values, namespace=namespace)
    del obj["type"]
    return decode({"apiVersion": "v1", "kind": "Secret"} | obj, Secret)


def plan(policies: list[ObservedPolicy], pools: list[ObservedPool] | None = None, *secrets: Secret) -> Plan:
    """What is decided about these, in a world of nothing else."""
    found = {(each.metadata.namespace, each.metadata.name): each for each in secrets}
    world = World("c1", ISSUER, tuple(policies), tuple([pool()] if pools is None else pools), found, {})
    return make_plan(world)


def reasons(made: Plan, observed: ObservedPolicy | ObservedPool) -> list[Reason]:
    """Of the problems of one object."""
    return [problem.reason for problem in made.problems.get(observed.reference, ())]


def status_of(accepted: str, programmed: str, *, generation: int = 1, reason: str = "X", **more: Any) -> Json:
    """A status as it is stored."""
    rows = {"Accepted": accepted, "Programmed": programmed, "Ready": programmed, "Stalled": "False"}
    return {
        "observedGeneration": generation,
        "conditions": [
            {
                "type": kind,
                "status": status,
                "reason": reason,
                "message": "",
                "observedGeneration": generation,
                "lastTransitionTime": "2026-01-01T00:00:00Z",
            }
            for kind, status in rows.items()
        ],
        **more,
    }


def report(
    name: str, state: PodState, enforced: Version | None, *, ready_for: float = 100.0, reason: str = ""
) -> PodReport:
    """Where a pod stands that has been ready for so many seconds at `NOW`."""
    pod = msgspec.structs.replace(read_pod(make_pod(name)), ready_since=NOW - ready_for)
    return PodReport(pod=pod, state=state, since=NOW, message="why", reason=reason, boot_id="b", enforced=enforced)


def pool_state(reports: list[PodReport], current: Version = CURRENT, **more: Any) -> PoolState:
    """Of a pool of exactly these pods."""
    return PoolState([each.pod for each in reports], reports, current, NOW, grace=10.0, **more)


def conditions_of(status: TenantPolicyStatus | EnginePoolStatus) -> dict[str, tuple[str, str]]:
    """Status and reason by type."""
    return {condition.type: (str(condition.status), condition.reason) for condition in status.conditions}
