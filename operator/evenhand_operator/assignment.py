"""Assignment: which pods are whose. A pod is told by one pool, and by no other, whatever the selectors say. Pure."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from evenhand_operator.objects import EnginePod, ObjectKey
from evenhand_policy.errors import PolicyProblem, Reason, ResourceReference, problem_of, reference
from evenhand_policy.pool import EnginePool

POOL_LABEL = "evenhand.dev/pool"
_SHOWN_PODS = 3


class Assignment(NamedTuple):
    """Pods of each pool by name, and the problem of each pool of whose pods others have some."""

    pods: Mapping[ObjectKey, tuple[EnginePod, ...]]
    overlaps: Mapping[ResourceReference, PolicyProblem]


def assign_pods(pools: Iterable[EnginePool], pods: Iterable[EnginePod]) -> Assignment:
    """Give each pod to a pool of its namespace that selects it.

    A pod whose label `evenhand.dev/pool` names one of these has that one; without it, or where it names none that selects
    the pod, the oldest pool has it, then the first by name. So the outcome is the same for every leader, at any time.
    """
    by_namespace: dict[str, list[EnginePool]] = defaultdict(list)
    for pool in sorted(pools, key=_age):
        by_namespace[pool.metadata.namespace].append(pool)
    assigned: dict[ObjectKey, list[EnginePod]] = {
        (namespace, pool.metadata.name): [] for namespace, found in by_namespace.items() for pool in found
    }
    lost: dict[ObjectKey, list[tuple[EnginePod, EnginePool]]] = defaultdict(list)
    by_key = {(pool.metadata.namespace, pool.metadata.name): pool for found in by_namespace.values() for pool in found}
    for pod in sorted(pods, key=lambda pod: pod.key):
        claimants = [pool for pool in by_namespace.get(pod.key[0], ()) if pool.spec.selector.matches(pod.labels)]
        if not claimants:
            continue
        named = [pool for pool in claimants if pool.metadata.name == pod.labels.get(POOL_LABEL)]
        owner = (named or claimants)[0]
        assigned[pod.key[0], owner.metadata.name].append(pod)
        for pool in claimants:
            if pool is not owner:
                lost[pod.key[0], pool.metadata.name].append((pod, owner))
    overlaps = {reference(by_key[key]): _overlap(by_key[key], found) for key, found in lost.items()}
    return Assignment({key: tuple(found) for key, found in assigned.items()}, overlaps)


def _overlap(pool: EnginePool, lost: list[tuple[EnginePod, EnginePool]]) -> PolicyProblem:
    shown = ", ".join(f"{pod.name} (of {owner.metadata.name})" for pod, owner in lost[:_SHOWN_PODS])
    more = f" and {len(lost) - _SHOWN_PODS} more" if len(lost) > _SHOWN_PODS else ""
    advice = (
        f"it selects pods that another EnginePool has: {shown}{more}; give each pool's pods a label of their own, such as "
        f"{POOL_LABEL}, and select by it"
    )
    return problem_of(pool, Reason.OVERLAPPING, "spec.selector", advice)


def _age(pool: EnginePool) -> tuple[str, str, str]:
    metadata = pool.metadata
    return metadata.creation_timestamp or "~", metadata.namespace, metadata.name
