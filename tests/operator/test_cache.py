"""What the operator knows of the cluster, whatever the watch delivers, repeats, delays or loses."""

import base64
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evenhand_operator.cache import Cache
from evenhand_operator.objects import read_pod

Json = dict[str, Any]


class Notices:
    """Records what the cache tells."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def documents_changed(self) -> None:
        self.told.append("documents")

    def pods_changed(self) -> None:
        self.told.append("pods")

    def statuses_changed(self) -> None:
        self.told.append("statuses")

    def gap_seen(self) -> None:
        self.told.append("gap")

    def take(self) -> list[str]:
        told, self.told = self.told, []
        return told


@pytest.fixture
def notices() -> Notices:
    return Notices()


@pytest.fixture
def cache(notices: Notices) -> Cache:
    return Cache(notices)


def policy(name: str = "a", version: int = 1, *, weight: int = 1, generation: int = 1, **extra: Any) -> Json:
    metadata = {
        "name": name,
        "namespace": "n",
        "uid": f"uid-{name}",
        "resourceVersion": str(version),
        "generation": generation,
        "creationTimestamp": "2026-01-01T00:00:00Z",
    }
    return {
        "apiVersion": "evenhand.dev/v1alpha1",
        "kind": "TenantPolicy",
        "metadata": metadata | extra.pop("metadata", {}),
        "spec": {"weight": weight},
    } | extra


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
    labelled = policy("a", 3, status={"observedGeneration": 1}, metadata={"resourceVersion": "3", "labels": {"x": "y"}})
    cache.policies.observe("MODIFIED", labelled)
    assert notices.take() == []


def test_policy_that_is_being_deleted_is_gone(cache: Cache) -> None:
    cache.policies.observe("ADDED", policy("a", 1))
    leaving = policy("a", 2, metadata={"resourceVersion": "2", "deletionTimestamp": "2026-01-01T00:00:00Z"})
    cache.policies.observe("MODIFIED", leaving)
    assert weights(cache) == {}


def test_list_drops_what_was_deleted_unseen_but_nothing_newer(cache: Cache) -> None:
    for name, version in (("gone", 1), ("kept", 2), ("newer", 9)):
        cache.policies.observe("ADDED", policy(name, version))
    cache.policies.take(policy("kept", 2))
    cache.policies.keep_only(["uid-kept"], 5)
    assert set(weights(cache)) == {"kept", "newer"}


def test_every_listing_of_the_watch_may_hide_deletions(cache: Cache, notices: Notices) -> None:
    cache.policies.take(policy("a", 1))  # by our own list
    notices.take()
    cache.policies.observe(None, policy("a", 1))  # Kopf starts; what was deleted since is not in its list
    assert notices.take() == ["gap"]
    cache.policies.observe("MODIFIED", policy("a", 3))
    cache.policies.observe("DELETED", policy("a", 4))
    assert "gap" not in notices.take()
    cache.secrets.observe("ADDED", secret("keys", 5))
    assert notices.take() == []
    cache.secrets.observe(None, secret("keys", 5))
    assert notices.take() == ["gap"]


events = st.lists(st.tuples(st.sampled_from("abc"), st.booleans()), min_size=1, max_size=12)


def test_what_is_deleted_while_it_is_listed_or_written_stays_gone(cache: Cache) -> None:
    """The event overtakes the page of a list, and the answer to a write of ours."""
    cache.policies.observe("ADDED", policy("a", 1))
    cache.policies.observe("DELETED", policy("a", 5))
    cache.policies.take(policy("a", 3))
    assert weights(cache) == {}
    cache.policies.keep_only(["uid-a"], 4)
    cache.policies.take_written(policy("a", 4))
    assert weights(cache) == {}


def test_answer_to_a_write_is_ahead_of_its_event(cache: Cache) -> None:
    cache.policies.observe("ADDED", policy("a", 1))
    cache.policies.take_written(policy("a", 2, weight=7))
    assert weights(cache) == {"a": 7}


@given(events, st.data())
def test_list_after_any_loss_of_events_is_the_truth(happened: list[tuple[str, bool]], data: st.DataObject) -> None:
    cache, truth = Cache(Notices()), dict[str, int]()
    for version, (name, exists) in enumerate(happened, start=1):
        event = ("MODIFIED" if name in truth else "ADDED") if exists else "DELETED"
        if not exists and name not in truth:
            continue
        truth[name] = version
        if not exists:
            del truth[name]
        if data.draw(st.booleans(), label=f"version {version} arrives"):
            cache.policies.observe(event, policy(name, version, weight=version, generation=version))
    for name, version in truth.items():
        cache.policies.take(policy(name, version, weight=version, generation=version))
    cache.policies.keep_only([f"uid-{name}" for name in truth], len(happened))
    assert weights(cache) == truth


# ---- Secrets


def secret(name: str, version: int, value: str = "v", **metadata: str) -> Json:
    data = {"key": base64.b64encode(value.encode()).decode()}
    own = {"name": name, "namespace": "n", "uid": f"uid-{name}", "resourceVersion": str(version)}
    return {"metadata": own | metadata, "data": data, "type": "Opaque"}


def values(cache: Cache) -> dict[str, str]:
    return {key[1]: each.values()["key"].decode() for key, each in cache.secrets.found.items()}


def test_secret_that_nobody_names_is_not_kept(cache: Cache, notices: Notices) -> None:
    cache.secrets.observe("ADDED", secret("other", 1))
    assert cache.secrets.want([("n", "keys")]) == {("n", "keys")}
    assert values(cache) == {}
    assert notices.take() == []


def test_named_secret_is_followed(cache: Cache, notices: Notices) -> None:
    cache.secrets.want([("n", "keys")])
    cache.secrets.observe("ADDED", secret("keys", 1, "one"))
    cache.secrets.observe("MODIFIED", secret("keys", 2, "two"))
    cache.secrets.observe("MODIFIED", secret("keys", 3, "two", labels={"x": "y"}))
    assert values(cache) == {"keys": "two"}
    assert notices.take() == ["documents", "documents"]
    cache.secrets.observe("DELETED", secret("keys", 4))
    assert values(cache) == {}
    assert notices.take() == ["documents"]
    assert cache.secrets.want([("n", "keys")]) == set(), "that it is not there is known"


def test_secret_that_is_no_longer_named_is_forgotten(cache: Cache) -> None:
    cache.secrets.want([("n", "keys")])
    cache.secrets.take(secret("keys", 1))
    cache.secrets.want([])
    assert values(cache) == {}
    assert cache.secrets.want([("n", "keys")]) == {("n", "keys")}


def test_late_events_of_a_secret_change_nothing(cache: Cache) -> None:
    cache.secrets.want([("n", "keys")])
    cache.secrets.take(secret("keys", 5, "new"))
    cache.secrets.observe("MODIFIED", secret("keys", 4, "old"))
    cache.secrets.observe("DELETED", secret("keys", 3))
    cache.secrets.keep_only([], 4)
    assert values(cache) == {"keys": "new"}
    cache.secrets.keep_only([], 6)
    assert values(cache) == {}


# ---- pods


def pod(version: int = 1, *, ready: str = "True", restarts: int = 0, **metadata: Any) -> Json:
    own = {"name": "p", "namespace": "n", "uid": "u", "resourceVersion": str(version), "labels": {"app": "engine"}}
    port = {"name": "admin", "containerPort": 9100}
    running = {"running": {"startedAt": f"2026-01-01T00:00:0{restarts}Z"}}
    return {
        "metadata": own | metadata,
        "spec": {
            "containers": [{"name": "sidecar", "ports": [{"containerPort": 1}]}, {"name": "engine", "ports": [port]}]
        },
        "status": {
            "phase": "Running",
            "podIP": "127.1.2.3",
            "conditions": [{"type": "Ready", "status": ready, "lastTransitionTime": "2026-01-01T00:00:09Z"}],
            "containerStatuses": [
                {"name": "sidecar", "restartCount": 7, "state": {}},
                {"name": "engine", "restartCount": restarts, "state": running},
            ],
        },
    }


def test_pod_is_read() -> None:
    read = read_pod(pod())
    assert (read.name, read.url, read.ready_since) == ("p", "http://127.1.2.3:9100", 1767225609.0)
    assert read.started_at == 1767225600.0


def test_instance_is_that_of_the_engine_container() -> None:
    assert read_pod(pod()).instance == read_pod(pod(2, ready="False")).instance
    assert read_pod(pod()).instance != read_pod(pod(restarts=1)).instance
    assert read_pod(pod()).instance != read_pod(pod(uid="other")).instance


@pytest.mark.parametrize(
    "obj", [pod(ready="False"), pod(deletionTimestamp="2026-01-01T00:00:00Z"), pod() | {"status": {}}]
)
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
    cache.pods.observe("MODIFIED", pod(3, ready="False"))
    assert notices.take() == ["pods"]


# ---- namespaces


def test_labels_of_namespaces_matter_where_a_pool_selects_by_them(cache: Cache, notices: Notices) -> None:
    def namespace(version: int, **labels: str) -> Json:
        return {"metadata": {"name": "team", "uid": "t", "resourceVersion": str(version), "labels": labels}}

    cache.namespaces.observe("ADDED", namespace(1))
    assert notices.take() == []
    allowed = {"from": "Selector", "selector": {"matchLabels": {"team": "yes"}}}
    spec = {"selector": {"matchLabels": {"app": "engine"}}, "allowedNamespaces": allowed}
    cache.pools.observe("ADDED", policy("pool") | {"kind": "EnginePool", "spec": spec})
    notices.take()
    cache.namespaces.observe("MODIFIED", namespace(2, team="yes"))
    assert notices.take() == ["documents"]
    assert cache.namespace_labels() == {"team": {"team": "yes"}}
