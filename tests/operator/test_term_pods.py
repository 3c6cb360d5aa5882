"""A leader's term with engines: what they are told, by whom, and what their answers change."""

from typing import Any

import pytest

from evenhand_operator import metrics
from evenhand_operator.debounce import Debounce
from evenhand_operator.engine_client import EngineClient
from evenhand_policy.push_document import understood_members
from harness.term_api import TermApi, term


async def test_policy_is_programmed_once_the_pod_enforces_it(
    term_api: TermApi, changes: Any, engine: Any, client: EngineClient
) -> None:
    stand_in = await engine()
    term_api.store_pod("pod-0", stand_in.url)
    async with term(term_api, client):
        term_api.store("TenantPolicy", "a", weight=5)
        await changes.until(lambda: term_api.accepted("a") and term_api.condition("a", "Ready")[0] == "True")
        assert [tenant.weight for tenant in stand_in.receiver.in_force.config.tenants] == [5]
        assert stand_in.receiver.in_force.num_replicas == 1
    assert term_api.condition("a", "Programmed") == ("True", "Programmed")


async def test_document_is_stored_once_a_pod_is_well_with_it_though_nothing_else_changes(
    term_api: TermApi, changes: Any, engine: Any, client: EngineClient
) -> None:
    stand_in = await engine()
    stand_in.ailment = "the core does not enforce it yet"
    term_api.store_pod("pod-0", stand_in.url)
    term_api.signals.stored = Debounce(0.005, 0.02)
    async with term(term_api, client):
        term_api.store("TenantPolicy", "a", weight=5)
        await changes.until(lambda: term_api.term is not None and bool(term_api.term._unproven))
        assert term_api.stored == ["manifest"]
        assert queue_depth("pods") == 1
        stand_in.ailment = None
        await changes.until(lambda: term_api.stored == ["manifest", "0", "manifest"])
        await changes.until(lambda: queue_depth("pods") == 0)


def queue_depth(queue: str) -> float | None:
    return metrics.REGISTRY.get_sample_value("evenhand_operator_queue_depth", {"queue": queue})


async def test_pod_that_knows_a_newer_document_is_overtaken(
    term_api: TermApi, changes: Any, engine: Any, client: EngineClient, make: Any
) -> None:
    stand_in = await engine()
    pod, newer = make.pod("pod-0", stand_in.url), make.offer(30, epoch=9)
    await client.send(pod, newer, (await client.read(pod, newer)).boot_id)
    term_api.store_pod("pod-0", stand_in.url)
    async with term(term_api, client):
        term_api.store("TenantPolicy", "a", weight=5)
        await changes.until(lambda: term_api.accepted("a") and term_api.condition("a", "Ready")[0] == "True")
    in_force = stand_in.receiver.in_force
    assert [tenant.weight for tenant in in_force.config.tenants] == [5]
    assert in_force.assignment.version.epoch == 10
    assert in_force.assignment.version.revision > 30


async def test_pod_that_claims_an_epoch_that_nobody_could_overtake_bricks_nothing(
    term_api: TermApi, changes: Any, engine: Any, client: EngineClient, make: Any, caplog: pytest.LogCaptureFixture
) -> None:
    liar, honest = await engine("pod-0"), await engine("pod-1")
    claimed = make.offer(1, epoch=2**62)
    pod = make.pod("pod-0", liar.url)
    await client.send(pod, claimed, (await client.read(pod, claimed)).boot_id)
    term_api.store_pod("pod-0", liar.url)
    term_api.store_pod("pod-1", honest.url)
    async with term(term_api, client):
        term_api.store("TenantPolicy", "a", weight=5)
        await changes.until(lambda: [each.weight for each in honest.receiver.in_force.config.tenants] == [5])
        await changes.until(lambda: "epoch 4611686018427387904, which is not believed" in caplog.text)
    assert term_api.epoch == 1
    assert honest.receiver.in_force.assignment.version.epoch == 1


async def test_new_leader_takes_over_without_sending_what_is_in_force(
    term_api: TermApi, changes: Any, engine: Any, client: EngineClient
) -> None:
    stand_in = await engine()
    term_api.store_pod("pod-0", stand_in.url)
    term_api.store("TenantPolicy", "a", weight=5)
    async with term(term_api, client):
        await changes.until(lambda: term_api.accepted("a") and term_api.condition("a", "Ready")[0] == "True")
        assert term_api.term
        await term_api.term.store()
    revision = stand_in.revision
    stand_in.requests.clear()
    term_api.epoch = 2
    async with term(term_api, client):
        await changes.until(lambda: stand_in.receiver.in_force.assignment.version.epoch == 2)
    assert stand_in.revision == revision, "the same content is the same revision"
    assert "PUT" not in stand_in.requests


async def test_new_leader_that_finds_nothing_stored_goes_on_above_what_was_reported(
    term_api: TermApi, changes: Any, engine: Any, client: EngineClient
) -> None:
    stand_in = await engine()
    term_api.store_pod("pod-0", stand_in.url)
    for weight in (5, 6):
        async with term(term_api, client):
            term_api.store("TenantPolicy", f"a{weight}", weight=weight)
            await changes.until(lambda w=weight: term_api.condition(f"a{w}", "Ready")[0] == "True")  # type: ignore[misc]
        before, term_api.bootstrap = stand_in.revision, {}
        term_api.epoch += 1
    async with term(term_api, client):
        await changes.until(lambda: stand_in.receiver.in_force.assignment.version.epoch == 3)
    assert stand_in.revision > before


async def test_document_is_left_alone_while_the_pool_is_paused(
    term_api: TermApi, changes: Any, engine: Any, client: EngineClient
) -> None:
    stand_in = await engine()
    term_api.store_pod("pod-0", stand_in.url)
    async with term(term_api, client):
        term_api.store("TenantPolicy", "a", weight=5)
        await changes.until(lambda: term_api.condition("a", "Ready")[0] == "True")
        term_api.edit("default", paused=True)
        term_api.store("TenantPolicy", "b", weight=6)
        await changes.until(lambda: term_api.condition("b", "Ready") == ("False", "Paused"))
        assert term_api.condition("default", "Ready") == ("False", "Paused")
        assert [each.tenant_id for each in stand_in.receiver.in_force.config.tenants] == ["a"]
        other = await engine("pod-1")
        term_api.store_pod("pod-1", other.url)
        await changes.until(lambda: other.revision > 0)
        assert [each.tenant_id for each in other.receiver.in_force.config.tenants] == ["a"], (
            "a new pod has what all have"
        )
        assert term_api.term and await term_api.term.store()
    term_api.epoch = 2
    async with term(term_api, client):
        await changes.until(lambda: stand_in.receiver.in_force.assignment.version.epoch == 2)
        assert [each.tenant_id for each in stand_in.receiver.in_force.config.tenants] == ["a"], (
            "also under another leader"
        )
        term_api.edit("default", paused=False)
        await changes.until(lambda: term_api.condition("b", "Ready")[0] == "True")


async def test_paused_pool_of_which_nothing_is_stored_any_more_is_told_nothing(
    term_api: TermApi, changes: Any, engine: Any, client: EngineClient
) -> None:
    """What its engines have been told is not known to the new leader; the newest document is not what they should have."""
    stand_in = await engine()
    term_api.store_pod("pod-0", stand_in.url)
    async with term(term_api, client):
        term_api.store("TenantPolicy", "a", weight=5)
        await changes.until(lambda: term_api.condition("a", "Ready")[0] == "True")
    term_api.bootstrap = {}
    term_api.edit("default", paused=True)
    term_api.store("TenantPolicy", "b", weight=6)
    stand_in.requests.clear()
    async with term(term_api, client):
        await changes.until(lambda: term_api.condition("b", "Ready") == ("False", "Paused"))
        assert term_api.condition("default", "Ready") == ("False", "Paused")
        assert stand_in.requests == []
        term_api.edit("default", paused=False)
        await changes.until(lambda: term_api.condition("b", "Ready")[0] == "True")


@pytest.mark.parametrize(("on_deletion", "left"), [("Close", []), ("Keep", ["a"])])
async def test_pool_that_is_deleted_closes_where_it_says_so(
    term_api: TermApi, changes: Any, engine: Any, client: EngineClient, on_deletion: str, left: list[str]
) -> None:
    stand_in = await engine()
    term_api.store_pod("pod-0", stand_in.url)
    term_api.edit("default", onDeletion=on_deletion)
    async with term(term_api, client):
        term_api.store("TenantPolicy", "a", weight=5)
        await changes.until(lambda: term_api.condition("a", "Ready")[0] == "True")
        revision = stand_in.revision
        term_api.delete("default")
        await changes.until(lambda: term_api.condition("a", "Accepted") == ("False", "PoolNotFound"))
        if on_deletion == "Close":
            await changes.until(lambda: stand_in.revision > revision)
            assert stand_in.receiver.in_force.config.unknown_tenants.action == "Reject"
        assert [each.tenant_id for each in stand_in.receiver.in_force.config.tenants] == left


async def test_document_is_made_for_what_every_pod_understands(
    term_api: TermApi, changes: Any, engine: Any, client: EngineClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pool of engines of two versions; then the older one goes."""
    old, new = await engine("pod-0"), await engine("pod-1")
    members = understood_members()
    monkeypatch.setattr(
        "evenhand_engine.frontend.push_receiver.understood_members", lambda: members - {"tenants.fairness"}
    )
    term_api.store_pod("pod-0", old.url)
    async with term(term_api, client):
        term_api.store("TenantPolicy", "a", fairness="PerUser", weight=3)
        term_api.store("TenantPolicy", "b", weight=3)
        await changes.until(lambda: term_api.condition("a", "Ready") == ("False", "NotUnderstood"))
        await changes.until(lambda: term_api.condition("b", "Ready")[0] == "True")
        assert [each.weight for each in old.receiver.in_force.config.tenants] == [3, 3]
        monkeypatch.setattr("evenhand_engine.frontend.push_receiver.understood_members", lambda: members)
        term_api.store_pod("pod-1", new.url)
        await changes.until(lambda: new.revision > 0)
        assert new.receiver.in_force.config == old.receiver.in_force.config
        term_api.delete_pod("pod-0")
        await changes.until(lambda: term_api.condition("a", "Ready")[0] == "True")
        assert [str(each.fairness) for each in new.receiver.in_force.config.tenants] == ["PerUser", "FIFO"]
