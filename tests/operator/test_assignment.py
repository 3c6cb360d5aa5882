"""Each pod is one pool's, for everybody and always the same one."""

import random
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from evenhand_operator.assignment import POOL_LABEL, Assignment, assign_pods
from evenhand_operator.objects import EnginePod, read_pod
from evenhand_policy.decode import decode
from evenhand_policy.pool import EnginePool
from harness.builders import make_pod, make_pool


def pool(name: str, *, age: int = 0, namespace: str = "inference", **labels: str) -> EnginePool:
    meta = {"namespace": namespace, "creationTimestamp": f"2026-01-01T00:00:{59 - age:02}Z"}
    return decode(make_pool(name, meta=meta, selector={"matchLabels": labels or {"app": "engine"}}), EnginePool)


def pod(name: str, namespace: str = "inference", **labels: str) -> EnginePod:
    return read_pod(make_pod(name, namespace=namespace, labels={"app": "engine"} | labels))


def names(assignment: Assignment) -> dict[str, list[str]]:
    return {key[1]: [pod.name for pod in pods] for key, pods in assignment.pods.items()}


def test_pool_has_the_pods_of_its_namespace_that_it_selects() -> None:
    pods = [pod("b"), pod("a"), pod("elsewhere", "other"), read_pod(make_pod("plain", labels={"app": "web"}))]
    assignment = assign_pods([pool("default")], pods)
    assert names(assignment) == {"default": ["a", "b"]}
    assert assignment.overlaps == {}


def test_pods_of_one_app_are_told_apart_by_their_pools_label() -> None:
    pods = [pod("a", **{POOL_LABEL: "gold"}), pod("b", **{POOL_LABEL: "default"})]
    selective = [pool("gold", app="engine", **{POOL_LABEL: "gold"}), pool("default", **{POOL_LABEL: "default"})]
    assert names(assign_pods(selective, pods)) == {"gold": ["a"], "default": ["b"]}
    assert assign_pods(selective, pods).overlaps == {}


def test_label_decides_between_pools_that_both_select_a_pod() -> None:
    assignment = assign_pods([pool("old", age=9), pool("young")], [pod("a", **{POOL_LABEL: "young"}), pod("b")])
    assert names(assignment) == {"old": ["b"], "young": ["a"]}
    told = {str(resource): problem for resource, problem in assignment.overlaps.items()}
    assert told.keys() == {"EnginePool inference/old", "EnginePool inference/young"}
    problem = told["EnginePool inference/young"]
    assert (problem.reason, problem.path) == ("Overlapping", "spec.selector")
    assert "it selects pods that another EnginePool has: b (of old);" in problem.message


def test_without_the_label_the_oldest_pool_has_all() -> None:
    pods = [pod(f"pod-{index}") for index in range(5)] + [pod("z", **{POOL_LABEL: "nobody"})]
    assignment = assign_pods([pool("young"), pool("b", age=5), pool("a", age=5)], pods)
    assert [len(assignment.pods["inference", name]) for name in ("a", "b", "young")] == [6, 0, 0]
    assert len(assignment.overlaps) == 2
    assert all("and 3 more" in problem.message for problem in assignment.overlaps.values())


@given(st.randoms(), st.lists(st.sampled_from(["", "a", "b", "x"]), max_size=6))
def test_order_decides_nothing_and_no_pod_is_two_pools(shuffler: random.Random, labels: list[str]) -> None:
    pools = [pool("a", age=1), pool("b", age=1), pool("c", age=2)]
    pods = [pod(f"p{index}", **({POOL_LABEL: label} if label else {})) for index, label in enumerate(labels)]
    first: Any = assign_pods(pools, pods)
    shuffler.shuffle(pools)
    shuffler.shuffle(pods)
    assert assign_pods(pools, pods) == first
    assigned = [pod.key for found in first.pods.values() for pod in found]
    assert sorted(assigned) == sorted(pod.key for pod in pods)
