"""CustomResourceDefinitions of another version than the operator's, under an operator that runs."""

import json
import re
from collections.abc import Callable, Iterator

import pytest
import yaml

from cluster.control_plane import ControlPlane
from cluster.fixtures import CRDS
from harness.fixtures import Operators
from harness.objects import Object
from harness.operator_process import OperatorProcess
from harness.stage import Stage, until, until_still

FIELD = {"type": "string", "default": "blue"}


@pytest.fixture(scope="module")
def operator(operators: Operators, stage: Stage) -> OperatorProcess:
    operator = operators.start(stage.namespace)
    stage.wait_serving(2)
    return operator


@pytest.fixture
def change_crds(cluster: ControlPlane, crds: None) -> Iterator[Callable[[Callable[[Object], None]], None]]:
    """Replaces both schemas by changed ones; the test's end brings them back."""

    def change(edit: Callable[[Object], None]) -> None:
        for path in sorted(CRDS.glob("evenhand.dev_*.yaml")):
            crd = yaml.safe_load(path.read_text())
            edit(crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"])
            cluster.kubectl("replace", "-f", "-", stdin=json.dumps(versioned(cluster, crd)))

    yield change
    change(lambda _: None)


def versioned(cluster: ControlPlane, crd: Object) -> Object:
    stored = cluster.get("crd", crd["metadata"]["name"])
    return crd | {"metadata": crd["metadata"] | {"resourceVersion": stored["metadata"]["resourceVersion"]}}


def accepted_message(obj: Object) -> str:
    return next(each["message"] for each in obj["status"]["conditions"] if each["type"] == "Accepted")


def names_ignored(path: str, obj: Object) -> bool:
    """Beside others perhaps: a watch begun under another schema goes on to tell its defaults, for as long as it lasts."""
    told = rf"only a newer operator knows it: .*\b{re.escape(path)}\b"
    return re.search(told, accepted_message(obj)) is not None


def test_newer_crd_stops_nobody_and_what_is_ignored_is_told(
    stage: Stage, operator: OperatorProcess, change_crds: Callable[..., None]
) -> None:
    stage.apply("chat", weight=4)
    stage.wait_ready("chat")

    def add_field(schema: Object) -> None:
        schema["spec"]["properties"]["colour"] = FIELD

    change_crds(add_field)
    until(lambda: stage.policy("chat")["spec"].get("colour") == "blue")
    operator.stop()
    operator.start()  # everything is read anew
    stage.apply("research", weight=7, colour="red")
    stage.wait_ready("research")
    assert stage.enforced("chat", "weight") == [4, 4]
    assert stage.enforced("research", "weight") == [7, 7]
    for obj in (stage.policy("chat"), stage.policy("research"), stage.pool()):
        until(lambda obj=obj: names_ignored("spec.colour", refreshed(stage, obj)))


def test_value_that_only_a_newer_version_knows_stops_no_key(
    stage: Stage, operator: OperatorProcess, change_crds: Callable[..., None]
) -> None:
    """The operator was rolled back after somebody had used something new."""

    def add_value(schema: Object) -> None:
        if "latencyClass" in (properties := schema["spec"]["properties"]):
            properties["latencyClass"]["enum"].append("Realtime")

    change_crds(add_value)
    until(lambda: stage.apply("modern", weight=3, latencyClass="Realtime") is None)  # the new schema is in force soon
    stage.wait_ready("modern")
    assert stage.enforced("modern", "weight") == [3, 3]
    assert stage.enforced("modern", "latencyClass") == ["Standard"] * 2
    until(lambda: names_ignored("spec.latencyClass", stage.policy("modern")))
    stage.kubectl("delete", "tpol", "modern")


def refreshed(stage: Stage, obj: Object) -> Object:
    return stage.cluster.get(obj["kind"], obj["metadata"]["name"], stage.namespace)


def test_older_crd_loses_what_it_does_not_know_and_is_not_written_to_for_ever(
    stage: Stage, operator: OperatorProcess, change_crds: Callable[..., None]
) -> None:
    def drop_fields(schema: Object) -> None:
        for name in ("fairness", "prices"):
            schema["spec"]["properties"].pop(name, None)
        for name in ("programmedRevision", "applied"):
            schema["status"]["properties"].pop(name, None)

    change_crds(drop_fields)
    stage.apply("chat", weight=5)
    until(lambda: stage.enforced("chat", "weight") == [5, 5])
    stage.wait_ready("chat")
    until(lambda: "fairness" not in stage.policy("chat")["spec"])
    until(lambda: "applied" not in stage.pool()["status"])
    until_still(lambda: writes(operator), seconds=5)  # statuses are looked at every two seconds


def writes(operator: OperatorProcess) -> float:
    kinds = ("tenantpolicies/status", "enginepools/status")
    return sum(operator.metric("evenhand_operator_api_writes_total", resource=kind) for kind in kinds)
