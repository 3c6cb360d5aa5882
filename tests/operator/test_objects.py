"""Engine pods as the operator reads them."""

from typing import Any

import pytest

from evenhand_operator.objects import read_pod, read_time
from harness.builders import make_pod

Json = dict[str, Any]


def pod(version: int = 1, **more: Any) -> Json:
    return make_pod("p", version=version, **more)


def test_pod_is_read() -> None:
    read = read_pod(pod())
    assert (read.name, read.url, read.ready_since) == ("p", "http://127.1.2.3:9100", 1767225609.0)
    assert read.started_at == 1767225600.0


def test_instance_is_that_of_the_engine_container() -> None:
    assert read_pod(pod()).instance == read_pod(pod(2, ready=False)).instance
    assert read_pod(pod()).instance != read_pod(pod(restarts=1)).instance
    assert read_pod(pod()).instance != read_pod(pod(uid="other")).instance


def test_a_native_sidecar_is_the_engine_container_where_it_has_the_admin_port() -> None:
    """It stands among the init containers; its restarts are those of an engine process, and its container's port counts."""

    def beside(restarts: int, others: int) -> Json:
        obj = pod(restarts=restarts)
        spec, status = obj["spec"], obj["status"]
        vllm, evenhand = {"name": "vllm", "ports": []}, spec["containers"][1] | {"restartPolicy": "Always"}
        states = {each["name"]: each for each in status["containerStatuses"]}
        engine_status = {"name": "vllm", "restartCount": others, "state": {}}
        return obj | {
            "spec": {"initContainers": [{"name": "fetch"}, evenhand], "containers": [vllm]},
            "status": status | {"containerStatuses": [engine_status], "initContainerStatuses": [states["engine"]]},
        }

    assert read_pod(beside(0, 0)).url == "http://127.1.2.3:9100"
    assert read_pod(beside(0, 0)).instance == read_pod(beside(0, 3)).instance
    assert read_pod(beside(0, 0)).instance != read_pod(beside(1, 0)).instance
    assert read_pod(beside(0, 0)).started_at == 1767225600.0


@pytest.mark.parametrize("obj", [pod(ready=False), pod(deleted=True), pod() | {"status": {}}])
def test_pod_that_cannot_be_pushed_to_is_not_ready(obj: Json) -> None:
    assert read_pod(obj).ready_since is None


def test_pod_with_an_address_of_ipv6_and_no_named_port() -> None:
    obj = pod()
    obj["status"]["podIP"] = "fd00::1"
    obj["spec"] = {"containers": [{"name": "engine"}]}
    assert read_pod(obj).url == "http://[fd00::1]:9000"


@pytest.mark.parametrize("text", [None, "", "0000-01-01T00:00:00Z", "yesterday"])
def test_time_that_cannot_be_read_is_none(text: str | None) -> None:
    assert read_time(text) == 0.0
