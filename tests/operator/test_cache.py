"""What the operator knows of the cluster, whatever the watch delivers, repeats, delays or loses."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evenhand_operator.cache import Cache
from evenhand_operator.objects import read_meta
from evenhand_operator.tombstones import Tombstones
from harness.builders import Notices, make_namespace, make_pod, make_policy, make_pool

Json = dict[str, Any]


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


# ---- pods and namespaces


def test_heartbeats_of_pods_are_not_changes(cache: Cache, notices: Notices) -> None:
    cache.pods.observe("ADDED", make_pod("p", version=1))
    beat = make_pod("p", version=2)
    beat["status"]["conditions"][0]["lastProbeTime"] = "2026-01-01T00:01:00Z"
    cache.pods.observe("MODIFIED", beat)
    assert notices.take() == ["pods"]
    cache.pods.observe("MODIFIED", make_pod("p", version=3, ready=False))
    assert notices.take() == ["pods"]


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
