"""A leader's term: what is built, stored, written and left to others, with pods that are none."""

import base64
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from evenhand_operator import metrics
from evenhand_operator.debounce import Debounce
from evenhand_operator.engine_client import EngineClient
from evenhand_operator.kube import ApiError
from evenhand_policy.bootstrap import unpack
from evenhand_policy.push_document import open_document
from harness.term_api import SETTINGS, Json, TermApi, term


def keyed(secret: str) -> Json:
    return {"identities": [{"name": "keys", "type": "APIKey", "apiKey": {"secretRef": {"name": secret}}}]}


async def test_policy_that_arrives_while_secrets_are_read_waits_for_its_own(term_api: TermApi, changes: Any) -> None:
    term_api.store("TenantPolicy", "early", **keyed("early"))
    term_api.store_secret("early")
    term_api.store_secret("late")

    def arrive() -> None:
        term_api.before_read = lambda: None
        term_api.store("TenantPolicy", "late", **keyed("late"))

    term_api.before_read = arrive
    async with term(term_api):
        await changes.until(lambda: term_api.accepted("late"))
    assert term_api.accepted("early") == term_api.accepted("late") == ["Accepted"]


async def test_api_server_that_fails_while_secrets_are_read_is_asked_again(
    term_api: TermApi, changes: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("evenhand_operator.term._RETRY_SECONDS", 0.01)
    term_api.store("TenantPolicy", "early", **keyed("early"))
    term_api.store_secret("early")

    def fail() -> None:
        term_api.before_read = lambda: None
        raise ApiError(503, "starting")

    term_api.before_read = fail
    async with term(term_api):
        await changes.until(lambda: term_api.accepted("early"))
    assert term_api.accepted("early") == ["Accepted"]


async def test_next_leader_writes_nothing_that_is_right(term_api: TermApi, changes: Any) -> None:
    term_api.store("TenantPolicy", "a")
    term_api.store("TenantPolicy", "b")
    async with term(term_api):
        await changes.until(lambda: len(term_api.written) == 3)
    term_api.written.clear()
    term_api.epoch = 2
    async with term(term_api):
        await changes.until(lambda: bool(term_api.written))
        term_api.store("TenantPolicy", "c")
        await changes.until(lambda: bool(term_api.accepted("c")))
    assert {obj["metadata"]["name"] for obj in term_api.written} == {"default", "c"}, "the pool tells the new epoch"


async def test_changes_that_wait_are_counted_until_they_are_compiled(term_api: TermApi, changes: Any) -> None:
    depths: list[float | None] = []

    def depth() -> float | None:
        return metrics.REGISTRY.get_sample_value("evenhand_operator_queue_depth", {"queue": "changes"})

    def change_meanwhile() -> None:
        depths.append(depth())
        if len(depths) == 1:
            term_api.store("TenantPolicy", "b")
            depths.append(depth())

    term_api.store("TenantPolicy", "a")
    term_api.before_read = change_meanwhile
    async with term(term_api):
        await changes.until(lambda: bool(term_api.accepted("b")))
    assert depths[:2] == [0, 1]
    assert depth() == 0


async def test_status_that_could_not_be_written_is_written_later(
    term_api: TermApi, changes: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("evenhand_operator.reporter._LOOK_SECONDS", 0.01)
    monkeypatch.setattr("evenhand_operator.status_writer._FIRST_PAUSE_SECONDS", 0.01)
    term_api.store("TenantPolicy", "a")
    term_api.fail_writes = 3
    async with term(term_api):
        await changes.until(lambda: term_api.condition("a", "Ready") == ("True", "Ready"))
        await changes.until(lambda: bool(term_api.accepted("default")))


async def test_what_is_in_force_is_stored_before_the_end(term_api: TermApi, changes: Any) -> None:
    term_api.store("TenantPolicy", "a")
    async with term(term_api):
        await changes.until(lambda: len(term_api.written) == 2)
    assert term_api.stored == ["manifest"], "whom to believe is said at once, the document waits for more changes"
    assert term_api.term is not None
    assert await term_api.term.store()
    assert term_api.stored == ["manifest", "0", "manifest"]
    assert await term_api.term.store()
    assert len(term_api.stored) == 3, "what is stored is not stored again"


async def test_what_somebody_deleted_comes_back_however_often_something_changes(
    term_api: TermApi, changes: Any
) -> None:
    async def refresh() -> bool:
        return False

    term_api.key.refresh = refresh
    term_api.signals.stored = Debounce(0.005, 0.02)
    async with term(term_api, settings=replace(SETTINGS, relist_seconds=0.1)):
        await changes.until(lambda: "evenhand-bootstrap-default-0" in term_api.bootstrap)
        del term_api.bootstrap["evenhand-bootstrap-default-0"]

        def change() -> bool:
            term_api.signals.stored.signal()
            return "evenhand-bootstrap-default-0" in term_api.bootstrap

        await changes.until(change)


async def test_what_is_stored_is_signed_by_a_new_key_before_any_pod_answers(
    term_api: TermApi, changes: Any, client: EngineClient
) -> None:
    """So that pods that start meanwhile find whom to believe and what to begin with, in one piece."""
    term_api.store("TenantPolicy", "a")
    async with term(term_api):
        await changes.until(lambda: len(term_api.written) == 2)
        assert term_api.term and await term_api.term.store()
    new = Ed25519PrivateKey.generate()
    term_api.key = SimpleNamespace(current=new, trusted=(new.public_key(),), refresh=None)
    term_api.store_pod("pod-0", "http://127.0.0.1:1")
    async with term(term_api, client):
        await changes.until(lambda: len(term_api.stored) == 4)
    files = {
        name: base64.b64decode(content)
        for secret in term_api.bootstrap.values()
        for name, content in secret["data"].items()
    }
    manifest, compressed = unpack(files, (new.public_key(),))
    assert [tenant.tenant_id for tenant in open_document(compressed, manifest.digest).tenants] == ["a"]


async def test_pool_of_another_installation_is_left_alone(term_api: TermApi, changes: Any) -> None:
    """Its policies too: their statuses are the other's to write."""
    [theirs] = [obj for obj in term_api._objects.values() if obj["kind"] == "EnginePool"]
    theirs["status"] = {"operator": "default/evenhand-operator"}
    theirs["metadata"]["resourceVersion"] = str(int(theirs["metadata"]["resourceVersion"]) + 1)
    term_api.cache.pools.observe("MODIFIED", theirs)
    term_api.store("TenantPolicy", "theirs")
    term_api.store("EnginePool", "ours", selector={"matchLabels": {"app": "other"}})
    term_api.store("TenantPolicy", "ours-too", poolRef={"name": "ours"})
    async with term(term_api):
        await changes.until(lambda: len(term_api.written) == 2)
        await changes.until(lambda: len(term_api.told) == 1)
    assert {obj["metadata"]["name"] for obj in term_api.written} == {"ours", "ours-too"}
    assert [obj["metadata"]["name"] for obj in term_api.told] == ["default"]
    assert [obj["status"]["operator"] for obj in term_api.written if obj["metadata"]["name"] == "ours"] == [
        "evenhand-system/evenhand-operator"
    ]
