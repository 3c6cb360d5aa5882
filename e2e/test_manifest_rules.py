"""What the manifests say of order and of the network: nothing comes before what it needs, and nobody is called without need."""

from pathlib import Path
from typing import Any

import pytest

from harness.kustomize import render

WAVE = "argocd.argoproj.io/sync-wave"
API_SERVERS = {443, 6443, 8443, 16443}
"""Ports of API servers: most of them, kubeadm's, minikube's, MicroK8s'."""

Object = dict[str, Any]


def spec(rendered: list[Object], name: str) -> Object:
    """Of a NetworkPolicy."""
    [found] = [each for each in rendered if each["kind"] == "NetworkPolicy" and each["metadata"]["name"] == name]
    policy: Object = found["spec"]
    return policy


def peers(rule: Object) -> set[str]:
    """Whom a rule is about: namespaces by name, and networks; empty for everybody."""
    named: set[str] = set()
    for peer in rule.get("to", rule.get("from", [])):
        for expression in peer.get("namespaceSelector", {}).get("matchExpressions", []):
            named |= set(expression["values"])
        if "ipBlock" in peer:
            named.add(peer["ipBlock"]["cidr"])
    return named


@pytest.mark.parametrize("overlay", ["dev", "prod"])
def test_engines_call_nobody_unless_they_fetch_a_model(tmp_path: Path, overlay: str) -> None:
    policy = spec(render(tmp_path, overlay=overlay), "evenhand-engine")
    assert "Egress" in policy["policyTypes"]
    assert not policy.get("egress")
    hub, names = spec(render(tmp_path, "model-hub", overlay=overlay), "evenhand-engine")["egress"]
    assert hub == {"ports": [{"port": 443}]}
    assert peers(names) == {"kube-system", "openshift-dns", "169.254.20.10/32"}


def test_operator_reaches_every_usual_api_server_and_dns_and_no_more(tmp_path: Path) -> None:
    engines, api_server, names = spec(render(tmp_path), "evenhand-operator")["egress"]
    of_a_pool = {"matchExpressions": [{"key": "evenhand.dev/pool", "operator": "Exists"}]}
    assert engines["to"][0]["podSelector"] == of_a_pool, "whether engines or sidecars before others"
    assert {each["port"] for each in api_server["ports"]} == API_SERVERS
    assert peers(names) == {"kube-system", "openshift-dns", "169.254.20.10/32"}
    ports = {(each["port"], each["protocol"]) for each in names["ports"]}
    assert ports == {(port, protocol) for port in (53, 5353) for protocol in ("UDP", "TCP")}


@pytest.mark.parametrize("overlay", ["dev", "prod"])
def test_gateways_with_a_nodes_address_reach_the_public_port_only(tmp_path: Path, overlay: str) -> None:
    before = spec(render(tmp_path, overlay=overlay), "evenhand-engine")["ingress"]
    *kept, added = spec(render(tmp_path, "node-gateways", overlay=overlay), "evenhand-engine")["ingress"]
    assert kept == before
    assert added["ports"] == [{"port": "http"}]
    assert "10.0.0.0/8" in peers(added) and "0.0.0.0/0" not in peers(added)


@pytest.mark.parametrize("overlay", ["dev", "prod"])
def test_no_object_is_synced_before_its_namespace(tmp_path: Path, overlay: str) -> None:
    """Within a wave Argo CD applies namespaces first, as kubectl does here."""
    rendered = render(tmp_path, overlay=overlay)
    waves = {each["metadata"]["name"]: wave(each) for each in rendered if each["kind"] == "Namespace"}
    placed = [each for each in rendered if "namespace" in each["metadata"]]
    assert [name(each) for each in placed if wave(each) < waves[each["metadata"]["namespace"]]] == []
    kinds = [each["kind"] for each in rendered]
    assert kinds.index("Namespace") == 0 and "Namespace" not in kinds[len(waves) :]


@pytest.mark.parametrize("overlay", ["dev", "prod"])
def test_rights_come_before_the_operator_and_the_operator_before_its_pools_and_engines(
    tmp_path: Path, overlay: str
) -> None:
    rendered = render(tmp_path, overlay=overlay)
    by_name = {name(each): wave(each) for each in rendered}
    rights = [by_name[name(each)] for each in rendered if "Role" in each["kind"]]
    operator = by_name["Deployment/evenhand-operator"]
    assert max(rights) <= operator < by_name["EnginePool/default"] < by_name["Deployment/evenhand-engine"]


@pytest.mark.parametrize("overlay", ["dev", "prod"])
def test_an_update_is_given_the_time_that_its_probe_allows(tmp_path: Path, overlay: str) -> None:
    [engine] = [
        each["spec"] for each in render(tmp_path, overlay=overlay) if name(each) == "Deployment/evenhand-engine"
    ]
    probe = engine["template"]["spec"]["containers"][0]["startupProbe"]
    assert engine["progressDeadlineSeconds"] > probe["periodSeconds"] * probe["failureThreshold"]


def name(subject: Object) -> str:
    """Kind and name."""
    return f"{subject['kind']}/{subject['metadata']['name']}"


def wave(subject: Object) -> int:
    """When Argo CD applies it."""
    return int(subject["metadata"].get("annotations", {}).get(WAVE, "0"))
