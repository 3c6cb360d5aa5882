"""What an operator pushes to a sidecar's admin port, with one process and with two: in force in all of them, or in none."""

import contextlib
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from evenhand_engine.frontend.push_receiver import PushSettings
from evenhand_policy.bootstrap import KEYS_FILE
from evenhand_policy.config import Limits, PoolReference, SchedulerConfig
from evenhand_policy.push_document import encode_document
from evenhand_policy.push_protocol import CONFIG_PATH, make_request, sign_request
from evenhand_policy.signatures import write_key_set
from evenhand_policy.version import Assignment, Version

from .conftest import ScriptedUpstream, Sidecar, Start, say_three
from .pinned_clients import Pinned, config, connect_each

POOL = PoolReference(namespace="inference", name="default")
KEY = Ed25519PrivateKey.from_private_bytes(b"operator" * 4)
PROCESSES = pytest.mark.parametrize("num_processes", [1, 2])


@pytest.fixture
def push(tmp_path: Path) -> PushSettings:
    (tmp_path / "bootstrap").mkdir()
    (tmp_path / "bootstrap" / KEYS_FILE).write_bytes(write_key_set([KEY.public_key()]))
    return PushSettings(POOL, tmp_path / "bootstrap", last_good=tmp_path / "state" / "last-good.json")


def pooled(**tenants: dict[str, Any]) -> SchedulerConfig:
    return msgspec.structs.replace(config(**tenants), cluster="c1", pool=POOL)


async def put(
    sidecar: Sidecar,
    pushed: SchedulerConfig,
    epoch: int,
    revision: int,
    *,
    key: Ed25519PrivateKey = KEY,
    body: bytes | None = None,
) -> tuple[int, dict[str, Any]]:
    """As the operator does; returns status and report."""
    document = encode_document(pushed)
    assignment = Assignment(Version(epoch, revision), document.digest, 1)
    request = make_request("PUT", "", time.time(), cluster="c1", pool=POOL, assignment=assignment)
    data, headers = document.compressed if body is None else body, sign_request(key, request)
    async with sidecar.session.put(sidecar.admin_url + CONFIG_PATH, data=data, headers=headers) as response:
        return response.status, await response.json()


async def enforced(sidecar: Sidecar, pushed: SchedulerConfig, epoch: int, revision: int) -> dict[str, Any]:
    """The report once nothing is said to ail."""
    while True:
        status, report = await put(sidecar, pushed, epoch, revision)
        assert status == 200, report
        if not report["ailment"]:
            return report


@contextlib.asynccontextmanager
async def each_process(sidecar: Sidecar, num_processes: int, num_clients: int) -> AsyncIterator[list[list[Pinned]]]:
    if num_processes == 1:
        yield [[Pinned(sidecar.url, sidecar.session, 0)] * num_clients]
        return
    async with contextlib.AsyncExitStack() as stack:
        yield await connect_each(stack, sidecar.url, num_clients)


async def statuses(clients: list[Pinned], tenant_id: str) -> set[int]:
    return {(await client.ask(tenant_id))[0] for client in clients}


@PROCESSES
async def test_a_push_is_in_force_in_every_process_once_the_report_is_well(
    upstream: ScriptedUpstream, start: Start, push: PushSettings, num_processes: int
) -> None:
    upstream.script = say_three
    sidecar = await start(upstream.url, api_server_count=num_processes, push=push)
    async with each_process(sidecar, num_processes, 1) as parts:
        clients = [client for [client] in parts]
        assert await statuses(clients, "a") == {503}, "nobody is served before there is a config"
        report = await enforced(sidecar, pooled(a={}), 1, 1)
        assert (report["epoch"], report["revision"], report["source"]) == (1, 1, "Push")
        assert await statuses(clients, "a") == {200} and await statuses(clients, "b") == {401}

        await enforced(sidecar, pooled(a={"suspended": True}, b={"limits": Limits(max_output_tokens=1)}), 1, 2)
        assert await statuses(clients, "a") == {403}
        assert await statuses(clients, "b") == {400}, "two outputs are asked for"
        await enforced(sidecar, pooled(b={"limits": Limits(requests_per_minute=1)}), 2, 1)
        assert await statuses(clients, "a") == {401}
        bucket = sidecar.service.admission.account("b").requests
        assert bucket is not None
        bucket.rate = 1e-9  # the machine may be slow
        answers = [(await client.ask("b"))[0] for client in clients * 2]
        assert sorted(answers) == [200, *[429] * (len(answers) - 1)], "the quota is one"
    async with sidecar.session.get(sidecar.admin_url + "/v1/scheduler-config") as response:
        shown = await response.json()
    assert (shown["source"], shown["epoch"], shown["revision"]) == ("Push", 2, 1)
    assert [tenant["tenantId"] for tenant in shown["config"]["tenants"]] == ["b"]
    await sidecar.settled()


@PROCESSES
async def test_a_push_that_is_not_the_operators_or_older_or_garbage_changes_nothing(
    upstream: ScriptedUpstream, start: Start, push: PushSettings, num_processes: int
) -> None:
    upstream.script = say_three
    sidecar = await start(upstream.url, api_server_count=num_processes, push=push)
    await enforced(sidecar, pooled(a={}), 2, 5)
    other = pooled(b={})
    refused = {
        "another's key": await put(sidecar, other, 3, 1, key=Ed25519PrivateKey.generate()),
        "an older epoch": await put(sidecar, other, 1, 9),
        "an older revision": await put(sidecar, other, 2, 4),
        "the same version": await put(sidecar, other, 2, 5),
        "garbage": await put(sidecar, other, 3, 1, body=b"\x00garbage" * 100),
        "another body": await put(sidecar, other, 3, 1, body=encode_document(pooled(c={})).compressed),
        "no body": await put(sidecar, other, 3, 1, body=b""),
    }
    assert {name: status for name, (status, _) in refused.items()} == {
        "another's key": 401,
        "an older epoch": 409,
        "an older revision": 409,
        "the same version": 409,
        "garbage": 422,
        "another body": 422,
        "no body": 422,
    }
    assert all(report["problem"] for _, report in refused.values())
    async with sidecar.session.put(sidecar.admin_url + CONFIG_PATH, data=encode_document(other).compressed) as response:
        assert response.status == 401, "unsigned"
    async with each_process(sidecar, num_processes, 1) as parts:
        for clients in parts:
            assert (await statuses(clients, "a"), await statuses(clients, "b")) == ({200}, {401})
    async with sidecar.session.get(sidecar.admin_url + "/v1/scheduler-config") as response:
        shown = await response.json()
    assert (shown["epoch"], shown["revision"]) == (2, 5)
    assert "digest" in shown["error"], "what was signed and could not be read is told of"


async def test_what_was_pushed_is_enforced_again_after_a_restart(
    upstream: ScriptedUpstream, start: Start, push: PushSettings
) -> None:
    upstream.script = say_three
    sidecar = await start(upstream.url, api_server_count=2, push=push)
    await enforced(sidecar, pooled(a={}), 1, 7)
    assert push.last_good is not None
    await sidecar.until(push.last_good.exists)
    restarted = await start(upstream.url, api_server_count=2, push=push)
    async with restarted.session.get(restarted.admin_url + "/v1/scheduler-config") as response:
        shown = await response.json()
    assert (shown["source"], shown["revision"]) == ("LastGood", 7)
    assert (await put(restarted, pooled(b={}), 1, 6))[0] == 409
