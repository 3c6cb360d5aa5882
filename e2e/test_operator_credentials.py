"""What the operator believes, and by what it is believed, is replaced while it runs; and the API server has no time for it.

In a control plane of its own, since nobody else's credentials would be good any more.
"""

import contextlib
import http.client
import os
import signal
import ssl
import time
from collections.abc import Iterator
from pathlib import Path

import jwt
import pytest
from jwt.algorithms import RSAAlgorithm

from cluster.control_plane import ControlPlane
from cluster.fixtures import install_crds, new_control_plane
from cluster.pod_runner import PodRunner
from harness.fixtures import OPERATOR, OPERATOR_NAMESPACE, Operators, install_operator_rights, new_served_namespace
from harness.objects import Object, light_engines, policy, pool
from harness.operator_process import OperatorProcess
from harness.paging_proxy import PagingProxy
from harness.stage import Stage, conditions, until

OFTEN = ("--relist-seconds=10",)
MOST_PER_SECOND = 12.0  # some loops and watches, each of which waits for a second
LISTED = "evenhand_operator_last_list_timestamp_seconds"
NOTICED_SECONDS = 180.0  # half a minute without an answer, and what goes before and after it


@pytest.fixture(scope="module")
def own_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlPlane]:
    with new_control_plane(tmp_path_factory.mktemp("own-cluster")) as cluster:
        install_crds(cluster)
        yield cluster


@pytest.fixture(scope="module")
def kubeconfig(own_cluster: ControlPlane) -> Path:
    return install_operator_rights(own_cluster)


@pytest.fixture
def operators(own_cluster: ControlPlane, kubeconfig: Path, tmp_path: Path) -> Iterator[Operators]:
    operators = Operators(own_cluster, kubeconfig, tmp_path)
    yield operators
    operators.close()


@pytest.fixture(scope="module")
def own_stage(own_cluster: ControlPlane, kubeconfig: Path) -> Iterator[Stage]:
    for namespace in new_served_namespace(own_cluster):
        own_cluster.apply(pool(namespace))
        yield Stage(own_cluster, namespace)


def is_accepted(stage: Stage, name: str) -> bool:
    """In the generation that it has now."""
    obj = stage.policy(name)
    return (
        conditions(obj).get("Accepted", ("", ""))[0] == "True"
        and obj["status"]["observedGeneration"] == obj["metadata"]["generation"]
    )


def test_tokens_of_a_key_that_was_rotated_in_are_known_to_engines(
    own_cluster: ControlPlane, own_stage: Stage, operators: Operators
) -> None:
    namespace = own_stage.namespace
    operators.start(namespace, options=OFTEN)
    with PodRunner(own_cluster, namespace):
        own_cluster.apply(light_engines(namespace, 1))
        own_stage.wait_serving(1)
        before = own_cluster.service_account_token(namespace, "default", audience="evenhand")
        own_cluster.rotate_service_account_key()
        after = own_cluster.service_account_token(namespace, "default", audience="evenhand")
        assert jwt.get_unverified_header(before)["kid"] != jwt.get_unverified_header(after)["kid"]
        until(lambda: [len(each) for each in known_keys(own_stage)] == [2])
        [keys] = known_keys(own_stage)
        for token in (before, after):
            [key] = [each for each in keys if each["kid"] == jwt.get_unverified_header(token)["kid"]]
            claims = jwt.decode(token, RSAAlgorithm.from_jwk(key), algorithms=["RS256"], audience="evenhand")  # type: ignore[arg-type]
            assert claims["kubernetes.io"]["namespace"] == namespace
        own_stage.kubectl("delete", "deployment", "engines")
        until(lambda: not own_stage.ready_pods())


def known_keys(stage: Stage) -> list[list[Object]]:
    """Public keys of the cluster's issuer that each engine enforces."""
    return [each["config"]["serviceAccounts"]["jwks"]["keys"] for each in stage.documents()]


def test_operator_that_the_api_server_has_no_time_for_waits_and_goes_on(
    own_cluster: ControlPlane, own_stage: Stage, operators: Operators
) -> None:
    """429 with Retry-After to all that it asks: it asks no more often than that, and misses nothing."""
    operator = operators.start(own_stage.namespace, options=OFTEN)
    with limited(own_cluster), all_refused(own_cluster, operator):
        own_cluster.apply(policy(own_stage.namespace, "during", weight=2))
        began_at, before = time.monotonic(), num_refused(own_cluster)
        until(lambda: num_refused(own_cluster) > before + 5)
        pace = (num_refused(own_cluster) - before) / (time.monotonic() - began_at)
        assert pace < MOST_PER_SECOND
        assert operator.probe("healthz") == 200
        assert not is_accepted(own_stage, "during")
    until(lambda: is_accepted(own_stage, "during"))


@contextlib.contextmanager
def limited(cluster: ControlPlane) -> Iterator[None]:
    """One request of the operator at a time: the first is always let in, whatever the limit."""
    account = {"kind": "ServiceAccount", "serviceAccount": {"name": OPERATOR, "namespace": OPERATOR_NAMESPACE}}
    everything = {"verbs": ["*"], "apiGroups": ["*"], "resources": ["*"], "clusterScope": True, "namespaces": ["*"]}
    version = "flowcontrol.apiserver.k8s.io/v1"
    limited = {"nominalConcurrencyShares": 0, "borrowingLimitPercent": 0, "limitResponse": {"type": "Reject"}}
    cluster.apply(
        {
            "apiVersion": version,
            "kind": "PriorityLevelConfiguration",
            "metadata": {"name": "no-time"},
            "spec": {"type": "Limited", "limited": limited},
        },
        {
            "apiVersion": version,
            "kind": "FlowSchema",
            "metadata": {"name": "no-time"},
            "spec": {
                "priorityLevelConfiguration": {"name": "no-time"},
                "matchingPrecedence": 2,
                "rules": [{"subjects": [account], "resourceRules": [everything]}],
            },
        },
    )
    try:
        cluster.kubectl("wait", "flowschema/no-time", "--for=condition=Dangling=false", "--timeout=120s")
        yield
    finally:
        cluster.kubectl("delete", "flowschema,prioritylevelconfiguration", "no-time")


@contextlib.contextmanager
def all_refused(cluster: ControlPlane, operator: OperatorProcess) -> Iterator[None]:
    """A request of the operator's account, of which the body does not come, takes the only place, while the operator stands
    still, which could be faster."""
    token = cluster.service_account_token(OPERATOR_NAMESPACE, OPERATOR)
    os.kill(operator.program.pid, signal.SIGSTOP)
    until(lambda: num_counted(cluster, "current_executing_requests") == 0)
    with contextlib.closing(
        http.client.HTTPSConnection(
            cluster.server.removeprefix("https://"), context=ssl.create_default_context(cafile=cluster.authority)
        )
    ) as connection:
        connection.putrequest("POST", f"/apis/coordination.k8s.io/v1/namespaces/{OPERATOR_NAMESPACE}/leases")
        for name, value in (
            ("Authorization", f"Bearer {token}"),
            ("Content-Type", "application/json"),
            ("Content-Length", "1000"),
        ):
            connection.putheader(name, value)
        connection.endheaders(b"{")
        until(lambda: num_counted(cluster, "current_executing_requests") == 1)
        os.kill(operator.program.pid, signal.SIGCONT)
        yield


def num_refused(cluster: ControlPlane) -> int:
    """Requests of the operator's account."""
    return num_counted(cluster, "rejected_requests_total")


def num_counted(cluster: ControlPlane, what: str) -> int:
    """By the API server, of the requests to which it gives no time."""
    lines = cluster.kubectl("get", "--raw", "/metrics").splitlines()
    start = f"apiserver_flowcontrol_{what}{{"
    return sum(int(line.split()[-1]) for line in lines if line.startswith(start) and '"no-time"' in line)


def test_lists_whose_pages_expire_are_begun_anew(
    own_cluster: ControlPlane, own_stage: Stage, operators: Operators, kubeconfig: Path
) -> None:
    """Those of the operator's own, and that of Kopf, in the middle of which the API server forgets what it was to list."""
    names = [f"paged-{index}" for index in range(5)]
    own_cluster.apply(*(policy(own_stage.namespace, name) for name in names))
    with PagingProxy(own_cluster.server, own_cluster.authority, own_cluster.forget_history) as proxy:
        operator = operators.start(own_stage.namespace, kubeconfig=proxy.kubeconfig(kubeconfig))
        for program in ("evenhand-operator", "kopf"):
            until(lambda program=program: proxy.answers["tenantpolicies", program, 410] >= 1)  # type: ignore[misc]
            until(lambda program=program: proxy.answers["tenantpolicies", program, 200] >= 2)  # type: ignore[misc]
        until(lambda: all(is_accepted(own_stage, name) for name in names))
        own_stage.kubectl("delete", "tpol", *names[1:])
        own_cluster.apply(policy(own_stage.namespace, names[0], weight=7))
        until(lambda: is_accepted(own_stage, names[0]))
        num_left = len(own_cluster.find("tenantpolicies.evenhand.dev", own_stage.namespace))
        until(lambda: operator.metric("evenhand_operator_policies", condition="Accepted") == num_left)
        operator.program.check_running()
        operator.stop()


def test_operator_under_which_etcd_is_restored_ends_and_begins_anew(
    own_cluster: ControlPlane, own_stage: Stage, operators: Operators
) -> None:
    """What it remembers has higher versions than what there is."""
    operator = operators.start(own_stage.namespace, options=OFTEN)
    own_cluster.apply(policy(own_stage.namespace, "kept", weight=2))
    until(lambda: is_accepted(own_stage, "kept"))
    own_cluster.save_state()
    own_cluster.apply(policy(own_stage.namespace, "lost", weight=2))
    own_cluster.pass_versions(300)  # more than there will be after the restoration until everything is listed again
    for weight in range(3, 9):
        own_cluster.apply(policy(own_stage.namespace, "kept", weight=weight))
    until(lambda: is_accepted(own_stage, "lost") and is_accepted(own_stage, "kept"))
    listed_at = operator.metric(LISTED)
    until(lambda: operator.metric(LISTED) > listed_at)
    own_cluster.restore_state()
    until(operator.program.exit_code)
    assert "HistoryLostError" in operator.log.read_text()
    operator.stop()
    operator.start()
    until(lambda: operator.metric("evenhand_operator_epoch") > 0 and is_accepted(own_stage, "kept"))
    stored = own_cluster.find("tenantpolicies.evenhand.dev", own_stage.namespace)
    assert "lost" not in [each["metadata"]["name"] for each in stored]
    until(lambda: operator.metric("evenhand_operator_policies", condition="Accepted") == len(stored))


def test_operator_learns_of_an_authority_that_took_the_place_of_another(
    own_cluster: ControlPlane, own_stage: Stage, operators: Operators
) -> None:
    """The last of this file: whoever has a kubeconfig of before is cut off."""
    operators.start(own_stage.namespace)  # lists rarely: what it is told, it is told by its watches
    own_cluster.replace_authority()
    own_cluster.service_account_kubeconfig(OPERATOR_NAMESPACE, OPERATOR)  # as the kubelet brings another ca.crt
    own_cluster.apply(policy(own_stage.namespace, "after", weight=2))
    until(lambda: is_accepted(own_stage, "after"), timeout=NOTICED_SECONDS)
    own_cluster.apply(policy(own_stage.namespace, "later", weight=2))
    until(lambda: is_accepted(own_stage, "later"))
