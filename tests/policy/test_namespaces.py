"""Which namespaces a pool admits, by what is known of their labels, and whose accounts they may claim."""

from typing import Any

import pytest

from evenhand_policy.compile import compile_policies
from evenhand_policy.decode import decode
from evenhand_policy.spec import TenantPolicy

from .build import Build, refusals
from .guests import EVERY, NAMESPACE, compiled, tenants


# ---- what is not known
@pytest.mark.parametrize(
    "expression",
    [
        {"key": "quarantined", "operator": "DoesNotExist"},
        {"key": "quarantined", "operator": "NotIn", "values": ["true"]},
        {"key": "team", "operator": "Exists"},
    ],
)
def test_namespace_whose_labels_are_not_known_is_not_admitted(guest: Build, pool: Build, expression: Any) -> None:
    selecting = pool(allowedNamespaces={"from": "Selector", "selector": {"matchExpressions": [expression]}})
    result = compiled([guest()], selecting, labels={})
    assert refusals(result) == [("web", "NamespaceUnknown", "spec.poolRef")]
    assert "select by kubernetes.io/metadata.name instead" in result.problems[0].message
    assert not compiled([guest()], selecting, labels={"guest": {"team": "gold"}}).problems


def test_grant_that_depends_on_unknown_labels_holds_back_what_a_later_one_would_give(
    guest: Build, admitting: Build
) -> None:
    grants = [
        {"namespaces": {"matchLabels": {"restricted": "true"}}},
        {"namespaces": {}, "maxWeight": 1000},
    ]
    result = compiled([guest(weight=1000)], admitting(*grants), labels={})
    assert refusals(result) == [("web", "NamespaceUnknown", "spec.poolRef")]
    assert "by which spec.grants of EnginePool inference/default decides" in result.problems[0].message


def test_namespace_is_known_by_its_name_without_its_labels(guest: Build, pool: Build) -> None:
    name = {"matchLabels": {"kubernetes.io/metadata.name": "guest"}}
    also = {**name, "matchExpressions": [{"key": "x", "operator": "Exists"}]}
    other = {"matchLabels": {"kubernetes.io/metadata.name": "other", "team": "tin"}}
    selecting = {"from": "Selector", "selector": name}
    grants = [{"namespaces": other, "maxWeight": 1}, {"namespaces": name, "maxWeight": 5}, {"namespaces": also}]
    result = compiled([guest(weight=5)], pool(allowedNamespaces=selecting, grants=grants), labels={})
    assert tenants(result) == {"guest/web": 5}


def test_label_that_pretends_to_be_the_name_does_not_count(guest: Build, pool: Build) -> None:
    selecting = {"from": "Selector", "selector": {"matchLabels": {"kubernetes.io/metadata.name": "trusted"}}}
    labels = {"guest": {"kubernetes.io/metadata.name": "trusted"}}
    assert refusals(compiled([guest()], pool(allowedNamespaces=selecting), labels)) == [
        ("web", "NotAllowed", "spec.poolRef")
    ]


# ---- every account of a namespace
def test_guest_claims_the_accounts_of_its_own_namespace_only(guest: Build, admitting: Build) -> None:
    grant = EVERY | {"identityTypes": ["ServiceAccountNamespace"]}
    foreign = {**NAMESPACE, "serviceAccountNamespace": {"namespace": "other"}}
    result = compiled([guest("a", identities=[NAMESPACE])], admitting(grant))
    assert result.config.tenants[0].service_accounts == ("system:serviceaccounts:guest",)
    result = compiled([guest("a", identities=[foreign])], admitting(grant))
    assert refusals(result) == [("a", "NotAllowed", "spec.identities[0].serviceAccountNamespace.namespace")]


def test_namespace_of_accounts_has_one_claimant(policy: Build) -> None:
    twice = [policy("a", age=2, identities=[NAMESPACE]), policy("b", age=1, identities=[NAMESPACE])]
    assert compile_policies([decode(each, TenantPolicy) for each in twice], None, {}).problems[0].reason == (
        "IdentityConflicted"
    )
