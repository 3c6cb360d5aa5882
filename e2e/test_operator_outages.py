"""Long, frequent and random interruptions: docs/reliability.md names the tests of this file."""

import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.control_plane import ControlPlane
from evenhand_policy.push_protocol import REPORT_PATH
from harness.cutting_proxy import CuttingProxy
from harness.fixtures import Operators
from harness.objects import ADMIN_PORT, Object, policy
from harness.operator_process import OperatorProcess, read_json
from harness.stage import PATIENCE, Stage, until

OUTAGES = [
    65.0,  # seconds: longer than every timeout of the operator's but for the watch's, and than every delay
    pytest.param(200.0, marks=[pytest.mark.soak, pytest.mark.timeout(400)]),
]


@pytest.fixture(scope="module")
def proxy(cluster: ControlPlane) -> Iterator[CuttingProxy]:
    with CuttingProxy(cluster.server) as proxy:
        yield proxy


@pytest.fixture(scope="module")
def operator(operators: Operators, operator_kubeconfig: Path, stage: Stage, proxy: CuttingProxy) -> OperatorProcess:
    """It reaches the API server by the proxy only, and has brought the engines into service."""
    operator = operators.start(stage.namespace, name="by-proxy", kubeconfig=proxy.kubeconfig(operator_kubeconfig))
    stage.wait_serving(2)
    return operator


def report_url(pod: Object) -> str:
    return f"http://{pod['status']['podIP']}:{ADMIN_PORT}{REPORT_PATH}"


def version(url: str) -> tuple[int, int]:
    """Epoch and revision in force there."""
    report = read_json(url)
    return report["epoch"], report["revision"]


class VersionLog:
    """Follows, in a thread, what the pods enforce; each pod's epoch and revision in the order seen."""

    def __init__(self, stage: Stage) -> None:
        self._urls = {pod["metadata"]["name"]: report_url(pod) for pod in stage.ready_pods()}
        self.seen: dict[str, list[tuple[int, int]]] = {name: [] for name in self._urls}
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._follow)

    def __enter__(self) -> "VersionLog":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _follow(self) -> None:
        while not self._done.wait(0.05):
            for name, url in self._urls.items():
                self.seen[name].append(version(url))

    @property
    def went_back(self) -> bool:
        """Whether any pod ever enforced something older than before."""
        return any(versions != sorted(versions) for versions in self.seen.values())


def apply_weights(stage: Stage, weights: dict[str, int]) -> None:
    stage.cluster.apply(*(policy(stage.namespace, name, weight=weight) for name, weight in weights.items()))


def enforced(stage: Stage, names: list[str]) -> list[dict[str, int | None]]:
    return [{name: tenants.get(name, {}).get("weight") for name in names} for tenants in stage.tenants()]


@pytest.mark.parametrize("seconds", OUTAGES)
def test_api_server_that_is_away_for_more_than_a_minute(
    stage: Stage, operator: OperatorProcess, proxy: CuttingProxy, seconds: float
) -> None:
    names = [f"away-{index}" for index in range(6)]
    apply_weights(stage, dict.fromkeys(names, 1))
    stage.wait_ready(*names)
    proxy.is_open = False
    proxy.cut()
    try:
        stage.kubectl("delete", "tpol", *names[:2])
        apply_weights(stage, {names[2]: 5, "born-meanwhile": 3})
        time.sleep(seconds)
        assert operator.probe("healthz") == 200, "it waits, and is not restarted for it"
        assert operator.metric("evenhand_operator_is_leader") == 0, "another one may lead by now"
        assert enforced(stage, names) == [dict.fromkeys(names, 1)] * 2, "engines keep what they have"
    finally:
        proxy.is_open = True
    names.append("born-meanwhile")
    expected: dict[str, int | None] = dict(zip(names, [None, None, 5, 1, 1, 1, 3], strict=True))
    until(lambda: enforced(stage, names) == [expected] * 2)
    stage.wait_ready(*names[2:])
    stage.kubectl("delete", "tpol", *names[2:])


def test_every_connection_is_cut_every_second(stage: Stage, operator: OperatorProcess, proxy: CuttingProxy) -> None:
    choose = random.Random(5)
    weights: dict[str, int | None] = {}

    def edit() -> None:
        for _ in range(12):
            name = f"cut-{choose.randrange(8)}"
            if weights.get(name) and choose.random() < 0.3:
                stage.kubectl("delete", "tpol", name)
                weights[name] = None
            else:
                weights[name] = choose.randint(1, 1000)
                apply_weights(stage, {name: weights[name] or 1})
            time.sleep(choose.uniform(0.0, 1.5))

    before = proxy.num_cut
    with VersionLog(stage) as log:
        editing = threading.Thread(target=edit)
        editing.start()
        proxy.cut_every(1.0, until=lambda: not editing.is_alive())
        given_up_at = time.monotonic() + PATIENCE
        proxy.cut_every(  # it does not stop being cut: everything has to come through all the same
            1.0, until=lambda: enforced(stage, list(weights)) == [weights] * 2 or time.monotonic() > given_up_at
        )
        assert enforced(stage, list(weights)) == [weights] * 2
    assert proxy.num_cut > before
    assert not log.went_back
    alive = [name for name, weight in weights.items() if weight]
    stage.wait_ready(*alive)
    stage.kubectl("delete", "tpol", *alive)


def test_operator_that_is_killed_at_random_moments_of_a_burst(
    stage: Stage, operator: OperatorProcess, operators: Operators
) -> None:
    choose = random.Random(7)
    names = [f"burst-{index}" for index in range(10)]
    with VersionLog(stage) as log:
        for weight in range(1, 6):
            apply_weights(stage, dict.fromkeys(names[: 2 * weight], weight))
            time.sleep(choose.uniform(0.0, 0.7))  # between the watch's event and the last status
            operator.kill()
            apply_weights(stage, dict.fromkeys(names[:weight], 100 + weight))
            operator.start(wait=False)
            if weight > 2:  # the next kill meets a leader; the first ones meet one that is still starting
                until(lambda: operator.metric("evenhand_operator_is_leader") == 1)
        expected = {name: 105 if index < 5 else 5 for index, name in enumerate(names)}
        until(lambda: enforced(stage, names) == [expected] * 2)
    stage.wait_ready(*names)
    assert not log.went_back

    def is_reported() -> bool:
        status = stage.pool()["status"]
        return {version(report_url(pod)) for pod in stage.ready_pods()} == {(status["epoch"], status["revision"])}

    until(is_reported)
    stage.kubectl("delete", "tpol", *names)
