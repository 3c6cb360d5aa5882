"""Which Secrets the operator knows, and that a revoked key never comes back."""

from typing import Any

import pytest

from evenhand_operator.cache import Cache
from evenhand_policy.secret import API_KEYS_TYPE
from harness.builders import Notices, make_secret

Json = dict[str, Any]


def secret(name: str, version: int, value: str = "v", **more: Any) -> Json:
    return make_secret(name, value, **{"namespace": "n", "version": version} | more)


def values(cache: Cache) -> dict[str, str]:
    return {key[1]: each.values["k0"].decode() for key, each in cache.secrets.found.items()}


OURS = {"type": API_KEYS_TYPE}


def test_secret_of_another_type_that_nobody_names_is_not_kept(cache: Cache, notices: Notices) -> None:
    cache.secrets.observe("ADDED", secret("other", 1))
    assert cache.secrets.want([("n", "keys")]) == {("n", "keys")}
    assert values(cache) == {}
    assert notices.take() == []


def test_secret_of_our_type_is_known_before_anybody_names_it(cache: Cache, notices: Notices) -> None:
    cache.secrets.observe("ADDED", secret("keys", 1, **OURS))
    assert notices.take() == [], "that decides about no document"
    assert cache.secrets.want([("n", "keys")]) == set()
    assert cache.secrets.namespaces_of_others() == set()
    cache.secrets.want([])
    assert values(cache) == {"keys": "v"}


def test_where_other_secrets_are_looked_for(cache: Cache) -> None:
    cache.secrets.take(secret("ours", 1, **OURS))
    cache.secrets.want([("n", "ours"), ("m", "missing"), ("o", "opaque")])
    cache.secrets.take(secret("opaque", 2, namespace="o"))
    assert cache.secrets.namespaces_of_others() == {"m", "o"}


@pytest.mark.parametrize("kind", [{}, OURS], ids=["opaque", "ours"])
def test_named_secret_is_followed(cache: Cache, notices: Notices, kind: Json) -> None:
    cache.secrets.want([("n", "keys")])
    cache.secrets.observe("ADDED", secret("keys", 1, "one", **kind))
    cache.secrets.observe("MODIFIED", secret("keys", 2, "two", **kind))
    cache.secrets.observe("MODIFIED", secret("keys", 3, "two", labels={"x": "y"}, **kind))
    assert values(cache) == {"keys": "two"}
    assert notices.take() == ["documents", "documents"]
    cache.secrets.observe("DELETED", secret("keys", 4, **kind))
    assert values(cache) == {}
    assert notices.take() == ["documents"]
    assert cache.secrets.want([("n", "keys")]) == set(), "that it is not there is known"


@pytest.mark.parametrize("kind", [{}, OURS], ids=["opaque", "ours"])
def test_secret_that_is_being_deleted_is_gone_and_stays_so(cache: Cache, notices: Notices, kind: Json) -> None:
    """A revoked key that a list or a late event brought back would work again."""
    cache.secrets.want([("n", "keys")])
    cache.secrets.take(secret("keys", 1, **kind))
    notices.take()
    cache.secrets.take(secret("keys", 3, deleted=True, **kind))
    assert (values(cache), notices.take()) == ({}, ["documents"])
    cache.secrets.take(secret("keys", 3, deleted=True, **kind))
    cache.secrets.observe("MODIFIED", secret("keys", 4, deleted=True, **kind))
    cache.secrets.take(secret("keys", 2, **kind))
    cache.secrets.observe("ADDED", secret("keys", 1, **kind))
    assert (values(cache), notices.take()) == ({}, [])
    assert cache.secrets.want([("n", "keys")]) == set()
    cache.secrets.take(secret("keys", 5, "new", uid="uid-of-another", **kind))
    assert values(cache) == {"keys": "new"}


def test_secret_that_is_made_again_of_our_type_is_that_of_our_type(cache: Cache) -> None:
    """Each type has a watch of its own, so the deletion of the old one may come late."""
    cache.secrets.want([("n", "keys")])
    cache.secrets.take(secret("keys", 1, "old"))
    cache.secrets.observe("ADDED", secret("keys", 3, "new", **OURS))
    cache.secrets.observe("DELETED", secret("keys", 2, "old"))
    cache.secrets.keep_only([], 9, "n", ours=False)
    assert values(cache) == {"keys": "new"}


def test_secret_that_is_no_longer_named_is_forgotten(cache: Cache) -> None:
    cache.secrets.want([("n", "keys")])
    cache.secrets.take(secret("keys", 1))
    cache.secrets.want([])
    assert values(cache) == {}
    assert cache.secrets.want([("n", "keys")]) == {("n", "keys")}


def test_late_events_of_a_secret_change_nothing(cache: Cache) -> None:
    cache.secrets.want([("n", "keys"), ("n", "missing"), ("m", "elsewhere")])
    cache.secrets.take(secret("keys", 5, "new"))
    cache.secrets.observe("MODIFIED", secret("keys", 4, "old"))
    cache.secrets.observe("DELETED", secret("keys", 3))
    cache.secrets.keep_only([], 4, "n", ours=False)
    assert values(cache) == {"keys": "new"}
    assert cache.secrets.want([("n", "keys"), ("n", "missing"), ("m", "elsewhere")]) == {("m", "elsewhere")}
    cache.secrets.keep_only([], 6, "m", ours=False)
    cache.secrets.keep_only([], 6, "n", ours=True)
    assert values(cache) == {"keys": "new"}, "neither list was of such Secrets"
    cache.secrets.keep_only([], 6, "n", ours=False)
    assert values(cache) == {}
