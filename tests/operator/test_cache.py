"""What the operator knows of the cluster, whatever the watch delivers, repeats, delays or loses."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evenhand_operator.cache import Cache
from evenhand_operator.objects import read_meta, read_pod
from evenhand_operator.tombstones import Tombstones
from evenhand_policy.secret import API_KEYS_TYPE
from harness.builders import Notices, make_namespace, make_pod, make_policy, make_pool, make_secret

Json = dict[str, Any]


@pytest.fixture
def notices() -> Notices:
    return Notices()


@pytest.fixture
def cache(notices: Notices) -> Cache:
    return Cache(notices)


def policy(name: str = "a", version: int = 1, *, weight: int = 1, **meta: Any) -> Json:
    status = meta.pop("status", None)
    return make_policy(name, meta={"namespace": "n", "version": version} | meta, status=status, weight=weight)


def weights(cache: Cache) -> dict[str, int]:
    return {each.key[1]: each.policy.spec.weight for each in cache.policies if each.policy}


def test_events_become_what_is_there(cache: Cache, notices: Notices) -> None:
    cache.policies.observe("ADDED", policy("a", 1))
    cache.policies.observe("ADDED", policy("b", 2))
    cache.policies.observe("MODIFIED", policy("a", 3, weight=4, generation=2))
    cache.policies.observe("DELETED", policy("b", 4))
    assert weights(cache) == {"a": 4}
    assert notices.take() == ["documents"] * 4


def test_what_is_older_than_what_is_known_is_ignored(cache: Cache, notices: Notices) -> None:
    cache.policies.observe("ADDED", policy("a", 5, weight=5))
    notices.take()
    cache.policies.observe("MODIFIED", policy("a", 4, weight=4))
    cache.policies.observe("DELETED", policy("a", 3))
    cache.policies.take(policy("a", 5, weight=6))
    assert weights(cache) == {"a": 5}
    assert notices.take() == []


def test_status_and_metadata_do_not_change_documents(cache: Cache, notices: Notices) -> None:
    cache.policies.observe("ADDED", policy("a", 1))
    notices.take()
    cache.policies.observe("MODIFIED", policy("a", 2, status={"observedGeneration": 1}))
    assert notices.take() == ["statuses"]
    labelled = policy("a", 3, status={"observedGeneration": 1}, labels={"x": "y"})
    cache.policies.observe("MODIFIED", labelled)
    assert notices.take() == []


def test_policy_that_is_being_deleted_is_gone_and_stays_so(cache: Cache) -> None:
    """A finalizer holds it; an older page of a list that is being read has it whole."""
    cache.policies.observe("ADDED", policy("a", 1))
    cache.policies.observe("MODIFIED", policy("a", 3, deleted=True))
    assert weights(cache) == {}
    cache.policies.take(policy("a", 2))
    cache.policies.observe(None, policy("a", 1))
    assert weights(cache) == {}
    cache.policies.observe("DELETED", policy("a", 4, deleted=True))
    cache.policies.take(policy("a", 2))
    assert weights(cache) == {}


def test_what_a_list_lacked_is_not_brought_back_by_an_older_one(cache: Cache) -> None:
    """Kopf's own list may be older than ours, and its events come late."""
    cache.policies.observe("ADDED", policy("a", 1))
    cache.policies.keep_only([], 5)
    cache.policies.observe(None, policy("a", 1))
    assert weights(cache) == {}
    cache.policies.observe("ADDED", policy("a", 6, uid="uid-of-another"))
    assert weights(cache) == {"a": 1}


def test_tombstones_are_not_kept_for_ever() -> None:
    now = 0.0
    graves = Tombstones[str](lambda: now)
    graves.bury("a", 5)
    graves.bury("a", 3)
    assert (graves.version("a"), graves.version("b")) == (5, -1)
    now = 899.0
    graves.bury("b", 6)
    assert graves.version("a") == 5, "a list may still be read that has it"
    now = 901.0
    graves.bury("c", 7)
    assert (graves.version("a"), graves.version("b")) == (-1, 6)


def test_list_drops_what_was_deleted_unseen_but_nothing_newer(cache: Cache) -> None:
    for name, version in (("gone", 1), ("kept", 2), ("newer", 9)):
        cache.policies.observe("ADDED", policy(name, version))
    kept = cache.policies.take(policy("kept", 2))
    cache.policies.keep_only([kept], 5)
    assert set(weights(cache)) == {"kept", "newer"}


def test_list_of_one_namespace_says_nothing_of_others(cache: Cache) -> None:
    cache.policies.observe("ADDED", policy("here", 1))
    cache.policies.observe("ADDED", policy("there", 2, namespace="m"))
    cache.policies.keep_only([], 5, "n")
    assert set(weights(cache)) == {"there"}


def test_every_listing_of_the_watch_may_hide_deletions(cache: Cache, notices: Notices) -> None:
    cache.policies.take(policy("a", 1))  # by our own list
    notices.take()
    cache.policies.observe(None, policy("a", 1))  # Kopf starts; what was deleted since is not in its list
    assert notices.take() == ["gap"]
    cache.policies.observe("MODIFIED", policy("a", 3))
    cache.policies.observe("DELETED", policy("a", 4))
    assert "gap" not in notices.take()


events = st.lists(st.tuples(st.sampled_from("abc"), st.booleans()), min_size=1, max_size=12)


def test_what_is_deleted_while_it_is_listed_or_written_stays_gone(cache: Cache) -> None:
    """The event overtakes the page of a list, and the answer to a write of ours."""
    cache.policies.observe("ADDED", policy("a", 1))
    cache.policies.observe("DELETED", policy("a", 5))
    cache.policies.take(policy("a", 3))
    assert weights(cache) == {}
    cache.policies.keep_only([read_meta(policy("a", 3))], 4)
    cache.policies.take_written(policy("a", 4))
    assert weights(cache) == {}


def test_answer_to_a_write_is_ahead_of_its_event(cache: Cache) -> None:
    cache.policies.observe("ADDED", policy("a", 1))
    cache.policies.take_written(policy("a", 2, weight=7))
    assert weights(cache) == {"a": 7}


@given(events, st.data())
def test_list_after_any_loss_of_events_is_the_truth(happened: list[tuple[str, bool]], data: st.DataObject) -> None:
    """Events are lost or come twice, deletions are held by finalizers, and older pages come in between."""
    cache, truth, past = Cache(Notices()), dict[str, Json](), list[Json]()
    for version, (name, exists) in enumerate(happened, start=1):
        event = ("MODIFIED" if name in truth else "ADDED") if exists else "DELETED"
        if not exists and name not in truth:
            continue
        is_held = not exists and data.draw(st.booleans(), label="held by a finalizer")
        obj = policy(name, version, weight=version, generation=version, deleted=is_held)
        truth[name] = obj
        if not exists:
            del truth[name]
        else:
            past.append(obj)
        if data.draw(st.booleans(), label=f"version {version} arrives"):
            cache.policies.observe("MODIFIED" if is_held else event, obj)
            if past and data.draw(st.booleans(), label="an older page follows"):
                older = data.draw(st.sampled_from(past))
                if truth.get(older["metadata"]["name"], older) is not older:
                    continue  # a page can be older than what is known of it, but tell nothing that never was
                cache.policies.take(older)
    present = [cache.policies.take(obj) for obj in truth.values()]
    cache.policies.keep_only(present, len(happened))
    assert weights(cache) == {name: obj["spec"]["weight"] for name, obj in truth.items()}
    for obj in past:
        cache.policies.take(obj)
    assert weights(cache) == {name: obj["spec"]["weight"] for name, obj in truth.items()}, "nothing comes back"


# ---- Secrets


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


# ---- pods


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


def test_heartbeats_of_pods_are_not_changes(cache: Cache, notices: Notices) -> None:
    cache.pods.observe("ADDED", pod(1))
    beat = pod(2)
    beat["status"]["conditions"][0]["lastProbeTime"] = "2026-01-01T00:01:00Z"
    cache.pods.observe("MODIFIED", beat)
    assert notices.take() == ["pods"]
    cache.pods.observe("MODIFIED", pod(3, ready=False))
    assert notices.take() == ["pods"]


# ---- namespaces


@pytest.mark.parametrize(
    "spec",
    [
        {"allowedNamespaces": {"from": "Selector", "selector": {"matchLabels": {"team": "yes"}}}},
        {"allowedNamespaces": {"from": "All"}, "grants": [{"namespaces": {"matchLabels": {"team": "yes"}}}]},
    ],
)
def test_labels_of_namespaces_matter_where_a_pool_selects_by_them(cache: Cache, notices: Notices, spec: Json) -> None:
    cache.namespaces.observe("ADDED", make_namespace("team"))
    assert notices.take() == []
    cache.pools.observe("ADDED", make_pool(**spec))
    notices.take()
    cache.namespaces.observe("MODIFIED", make_namespace("team", 2, team="yes"))
    assert notices.take() == ["documents"]
    assert cache.namespace_labels()["team"]["team"] == "yes"


def test_what_is_known_of_a_namespace_that_cannot_be_read_counts_for_nothing(cache: Cache, notices: Notices) -> None:
    cache.policies.take(policy("here"))
    cache.policies.take(policy("there", namespace="m"))
    cache.pools.take(make_pool("here", meta={"namespace": "n"}))
    notices.take()
    cache.set_unreadable(["n"])
    assert notices.take() == ["documents"]
    assert [each.key for each in cache.readable_policies()] == [("m", "there")]
    assert cache.readable_pools() == ()
    cache.set_unreadable(["n"])
    assert notices.take() == []
    cache.set_unreadable([])
    assert len(cache.readable_policies()) == 2 and len(cache.readable_pools()) == 1
