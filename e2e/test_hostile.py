"""Who tries what they should not: an editor without a grant, engines that lie about what they are, operators that compete."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from multidict import CIMultiDict, CIMultiDictProxy

from cluster.client import KubectlError
from cluster.control_plane import ISSUER, ControlPlane
from cluster.pod_runner import PodRunner
from evenhand_engine.errors import Refusal
from evenhand_engine.frontend.auth import Authenticator
from evenhand_policy.config import (
    SchedulerConfig,
    ServiceAccountIssuer,
    TenantConfig,
    UnknownTenantAction,
    UnknownTenants,
)
from harness.fixtures import Operators
from harness.objects import Object, api_key, light_engines, policy, pool, secret, service_account
from harness.operator_process import OperatorProcess
from harness.stage import Stage, conditions, until

KEY = "a-key-that-nobody-can-guess-{}".format
EDITOR = "mallory"


@pytest.fixture(scope="module")
def operator(operators: Operators, stage: Stage, other_namespace: str) -> OperatorProcess:
    """Of a pool that lets in everybody, without a grant, and has a tenant to take from, and one that is suspended."""
    operator = operators.start(stage.namespace, other_namespace)
    victim = [
        api_key("victim-keys"),
        {"name": "header", "type": "Header", "header": {"value": "victim"}},
        service_account("victim", "account"),
    ]
    stage.cluster.apply(
        pool(stage.namespace, allowedNamespaces={"from": "All"}, unknownTenants={"action": "Reject"}),
        secret(stage.namespace, "victim-keys", one=KEY("victim")),
        policy(stage.namespace, "victim", identities=victim, weight=2, limits={"requestsPerMinute": 60}),
        policy(stage.namespace, "banned", suspend=True),
    )
    stage.wait_serving(2)
    stage.wait_ready("victim", "banned")
    return operator


@pytest.fixture
def guest(stage: Stage, other_namespace: str, operator: OperatorProcess) -> Iterator[Stage]:
    """A namespace whose editor is hostile."""
    role = ["--clusterrole=evenhand-tenant-editor", f"--user={EDITOR}", "-n", other_namespace]
    stage.cluster.kubectl("create", "rolebinding", EDITOR, *role)
    guest = Stage(stage.cluster, other_namespace)
    until(lambda: stage.cluster.allows(EDITOR, "create", "tenantpolicies.evenhand.dev", other_namespace))
    yield guest
    guest.kubectl("delete", "tpol", "--all")
    guest.kubectl("delete", "rolebinding", EDITOR)


def as_editor(guest: Stage, *arguments: str, obj: Object | None = None) -> str:
    return guest.kubectl(*arguments, f"--as={EDITOR}", stdin=None if obj is None else json.dumps(obj))


def claim(stage: Stage, guest: Stage, name: str, **spec: object) -> None:
    reference = {"name": "default", "namespace": stage.namespace}
    as_editor(guest, "create", "-f", "-", obj=policy(guest.namespace, name, poolRef=reference, **spec))


CLAIMS: dict[str, Object] = {
    "weight": {"weight": 1000},
    "guarantee": {"kvCache": {"guaranteedPercent": 100}},
    "class": {"latencyClass": "Interactive"},
    "objective": {"slo": {"interTokenLatency": "1ms"}},
    "header": {"identities": [{"name": "h", "type": "Header", "header": {"value": "victim"}}]},
}


@pytest.mark.parametrize("what", CLAIMS)
def test_editor_without_a_grant_gets_no_more_than_a_guest(stage: Stage, guest: Stage, what: str) -> None:
    claim(stage, guest, "grab", **CLAIMS[what])
    guest.wait_refused("grab", "ExceedsGrant")
    assert_victim_is_well(stage)


def test_editor_without_a_grant_has_tenants_of_its_own_whatever_it_names_them(stage: Stage, guest: Stage) -> None:
    claim(stage, guest, "grab", tenant="victim", suspend=True)
    guest.wait_ready("grab")
    assert stage.enforced(f"{guest.namespace}/victim", "suspended") == [True, True]
    assert_victim_is_well(stage)


def assert_victim_is_well(stage: Stage) -> None:
    for tenants in stage.tenants():
        victim = tenants["victim"]
        assert (victim["weight"], victim["suspended"], victim["headerValues"]) == (2, False, ["victim"])
        assert victim["serviceAccounts"] == [f"system:serviceaccount:{stage.namespace}:victim"]
        assert not any(name.endswith("/grab") for name in tenants)
    assert stage.conditions("victim")["Ready"] == ("True", "Ready")


def test_editor_without_a_grant_claims_nobodys_account_nor_more_by_more_policies(stage: Stage, guest: Stage) -> None:
    theirs = {"name": "account", "type": "ServiceAccount"}
    theirs |= {"serviceAccount": {"name": "victim", "namespace": stage.namespace}}
    claim(stage, guest, "grab", identities=[theirs])
    guest.wait_refused("grab", "NotAllowed")
    assert_victim_is_well(stage)
    claim(stage, guest, "one")
    guest.wait_ready("one")
    claim(stage, guest, "two")
    guest.wait_refused("two", "ExceedsGrant")


def test_editor_writes_no_status_no_pool_and_reads_no_secret_of_others(stage: Stage, guest: Stage) -> None:
    claim(stage, guest, "own")
    ready = '{"status": {"programmedRevision": 7}}'
    open_pool = '{"spec": {"grants": [{"namespaces": {}, "maxWeight": 1000}]}}'
    for attempt in (
        ["patch", "tpol", "own", "--subresource=status", "--type=merge", "-p", ready],
        ["patch", "epool", "default", "-n", stage.namespace, "--type=merge", "-p", open_pool],
        ["get", "secret", "evenhand-bootstrap-default-manifest", "-n", stage.namespace],
        ["get", "secret", "evenhand-signing-key", "-n", "evenhand-system"],
    ):
        with pytest.raises(KubectlError, match=r"[Ff]orbidden"):
            stage.cluster.kubectl(*attempt, *([] if "-n" in attempt else ["-n", guest.namespace]), f"--as={EDITOR}")


# ---- engines


def test_engine_that_says_that_it_knows_nothing_opens_no_other_engine(stage: Stage, operator: OperatorProcess) -> None:
    """The operator makes the document for the oldest pod; what that lacks must not be what keeps others out."""
    members = ("unknownTenants", "tenants", "tenants.suspended", "tenants.limits", "tenants.keyHashes")
    lies = [f"--lacks={member}" for member in members]
    stage.cluster.apply(light_engines(stage.namespace, 1, *lies, name="liar"))
    try:
        stage.wait_serving(3)
        stage.cluster.apply(policy(stage.namespace, "later", limits={"requestsPerMinute": 7}, suspend=True))
        stage.wait_ready("later")
        for document in stage.documents():
            assert document["config"]["unknownTenants"]["action"] == "Reject"
            tenants = {tenant["tenantId"]: tenant for tenant in document["config"]["tenants"]}
            assert tenants["banned"]["suspended"] and tenants["later"]["suspended"]
            assert tenants["later"]["limits"]["requestsPerMinute"] == 7
            assert len(tenants["victim"]["keyHashes"]) == 1
    finally:
        stage.kubectl("delete", "deployment", "liar")
        stage.kubectl("delete", "tpol", "later", "--ignore-not-found")
    stage.wait_serving(2)


# ---- operators


def test_two_installations_that_start_at_once_agree_whose_the_pool_is(
    cluster: ControlPlane, operators: Operators, namespace: str, tmp_path: Path
) -> None:
    """Nobody has served the pool before; both have all rights, and Leases of their own."""
    stage = Stage(cluster, namespace)
    rivals = []
    for name in ("one", "two"):
        options = (f"--lease-name={name}-{namespace}", f"--lease-namespace={namespace}", "--log-level=debug")
        rivals.append(OperatorProcess(cluster, cluster.kubeconfig, tmp_path / f"{name}.log", [namespace], *options))
    with PodRunner(cluster, namespace):
        cluster.apply(pool(namespace), light_engines(namespace, 2), policy(namespace, "contested", weight=3))
        try:
            for rival in rivals:
                rival.start(wait=False)
            stage.wait_serving(2)
            stage.wait_ready("contested")
            until(lambda: sorted(rival.metric("evenhand_operator_foreign_pools") for rival in rivals) == [0, 1])
            until(lambda: conditions(stage.pool()).get("ForeignOperator") == ("True", "ForeignOperator"))
            before = stage.pool()["status"]
            cluster.apply(policy(namespace, "contested", weight=4))
            stage.wait_ready("contested")
            assert stage.enforced("contested", "weight") == [4, 4]
            assert stage.pool()["status"]["operator"] == before["operator"]
            loser = next(rival for rival in rivals if rival.metric("evenhand_operator_foreign_pools"))
            loser.stop()
            until(lambda: "ForeignOperator" not in conditions(stage.pool()))
        finally:
            for rival in rivals:
                rival.stop()
            cluster.kubectl("delete", "pods", "--all", "-n", namespace, "--force", "--wait=false")


# ---- accounts


def test_account_that_is_made_again_is_not_the_one_that_was_claimed(cluster: ControlPlane, namespace: str) -> None:
    """By the tokens that the API server signs, as an engine takes them."""
    cluster.kubectl("create", "serviceaccount", "web", "-n", namespace)
    uid = cluster.get("serviceaccount", "web", namespace)["metadata"]["uid"]
    account = f"system:serviceaccount:{namespace}:web"
    keys = json.loads(cluster.kubectl("get", "--raw", "/openid/v1/jwks"))
    config = SchedulerConfig(
        tenants=(TenantConfig(tenant_id="web", service_accounts=(f"{account}#{uid}",)),),
        service_accounts=ServiceAccountIssuer(issuer=ISSUER, audience="evenhand", jwks=keys),
        unknown_tenants=UnknownTenants(action=UnknownTenantAction.REJECT),
    )

    def ask() -> str:
        token = cluster.service_account_token(namespace, "web", audience="evenhand")
        return Authenticator(config).authenticate(CIMultiDictProxy(CIMultiDict(Authorization=f"Bearer {token}")))

    assert ask() == "web"
    cluster.kubectl("delete", "serviceaccount", "web", "-n", namespace)
    cluster.kubectl("create", "serviceaccount", "web", "-n", namespace)
    with pytest.raises(Refusal) as caught:
        ask()
    assert caught.value.code == "unknown_tenant"
