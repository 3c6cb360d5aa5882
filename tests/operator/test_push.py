"""The operator's half of the push, against the engine's real half and against pods that misbehave."""

import asyncio
import gzip
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
from aiohttp import web

from evenhand_operator.engine_client import EngineClient, PushError
from evenhand_operator.objects import write_time
from evenhand_operator.pusher import MAX_UNPROVEN, Pusher
from evenhand_policy.push_protocol import NONCE_HEADER, SIGNATURE_HEADER, sign_answer
from evenhand_policy.status import PodState, PodStatus

KEY, NEXT_KEY = b"a-push-key-of-the-pool-0001", b"a-push-key-of-the-pool-0002"
POOL = ("inference", "default")
Serve = Callable[[Callable[[web.Request], Awaitable[web.StreamResponse]]], Awaitable[str]]


@pytest.fixture
async def pusher(client: EngineClient, changes: Any) -> AsyncIterator[Pusher]:
    async with asyncio.TaskGroup() as tasks:
        pusher = Pusher(client, tasks, changes.notify)
        yield pusher
        pusher.drop(POOL)


async def test_engine_enforces_what_is_pushed(engine: Any, client: EngineClient, make: Any) -> None:
    stand_in = await engine()
    report = await client.push(stand_in.url, make.offer(3, epoch=2, num_replicas=5))
    assert (report.epoch, report.revision, report.boot_id) == (2, 3, stand_in.receiver.boot_id)
    config, num_replicas = stand_in.enforced[-1]
    assert (config.tenants[0].weight, num_replicas) == (4, 5)
    assert (await client.read(stand_in.url, make.offer(3, epoch=2))).revision == 3


async def test_engine_that_has_newer_says_so(engine: Any, client: EngineClient, make: Any) -> None:
    stand_in = await engine()
    await client.push(stand_in.url, make.offer(9, epoch=7))
    with pytest.raises(PushError) as caught:
        await client.push(stand_in.url, make.offer(10, epoch=6))
    assert (caught.value.state, caught.value.reason) == (PodState.REJECTED, "outdated")
    assert caught.value.report is not None
    assert (caught.value.report.epoch, caught.value.report.revision) == (7, 9)


async def test_rejection_carries_the_path(engine: Any, client: EngineClient, make: Any) -> None:
    stand_in = await engine()
    with pytest.raises(PushError, match=r"tenants\[0\].weight: .* \(status 422\)") as caught:
        await client.push(stand_in.url, make.offer(weight=0))
    assert (caught.value.state, caught.value.reason) == (PodState.REJECTED, "rejected")


@pytest.mark.parametrize("keys", [(KEY,), (KEY, NEXT_KEY), (NEXT_KEY, KEY)])
async def test_pod_that_knows_one_of_the_keys_is_reached(
    engine: Any, client: EngineClient, make: Any, keys: tuple[bytes, ...]
) -> None:
    stand_in = await engine(key=KEY)
    await client.push(stand_in.url, make.offer(keys=keys))
    assert stand_in.revision == 1


async def test_pod_that_knows_no_key_is_shown(engine: Any, client: EngineClient, make: Any) -> None:
    stand_in = await engine(key=KEY)
    with pytest.raises(PushError, match="does not know the pool's push key") as caught:
        await client.push(stand_in.url, make.offer(keys=(NEXT_KEY,)))
    assert (caught.value.state, caught.value.reason) == (PodState.REJECTED, "unauthorized")
    assert stand_in.revision == 0


async def test_pool_without_a_key_pushes_nothing(engine: Any, client: EngineClient, make: Any) -> None:
    stand_in = await engine()
    with pytest.raises(PushError, match="has no push key"):
        await client.push(stand_in.url, make.offer(keys=()))
    assert stand_in.num_requests == 0


# ---- pods that misbehave


def signed(request: web.Request, body: bytes, status: int = 200, **headers: str) -> web.Response:
    """An answer as an engine would sign it."""
    signature = sign_answer(KEY, request.headers[NONCE_HEADER], status, body)
    return web.Response(body=body, status=status, headers={SIGNATURE_HEADER: signature, **headers})


REPORT = {"bootId": "b", "epoch": 1, "revision": 1, "digest": "sha256:0", "source": "Push"}


BOMB = gzip.compress(b"0" * 1_000_000)


async def answer_never(_: web.Request) -> web.StreamResponse:
    await asyncio.sleep(60)
    raise AssertionError("cancelled before")


async def answer_byte_by_byte(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse()
    await response.prepare(request)
    while True:
        await response.write(b" ")
        await asyncio.sleep(0.01)


async def answer_without_end(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse()
    await response.prepare(request)
    while True:
        await response.write(b"x" * 65536)


async def answer_with_a_bomb(request: web.Request) -> web.StreamResponse:
    return signed(request, BOMB, **{"Content-Encoding": "gzip"})


async def answer_unsigned(_: web.Request) -> web.StreamResponse:
    return web.json_response(REPORT)


async def answer_signed_for_another_nonce(_: web.Request) -> web.StreamResponse:
    body = json.dumps(REPORT).encode()
    return web.Response(body=body, headers={SIGNATURE_HEADER: sign_answer(KEY, "0" * 32, 200, body)})


async def answer_signed_for_another_status(request: web.Request) -> web.StreamResponse:
    body = json.dumps(REPORT).encode()
    signature = sign_answer(KEY, request.headers[NONCE_HEADER], 422, body)
    return web.Response(body=body, headers={SIGNATURE_HEADER: signature})


async def answer_nonsense(request: web.Request) -> web.StreamResponse:
    return signed(request, b'{"bootId": ')


async def answer_with_long_texts(request: web.Request) -> web.StreamResponse:
    return signed(request, json.dumps(REPORT | {"bootId": "b" * 1000}).encode())


async def answer_that_another_is_in_force(request: web.Request) -> web.StreamResponse:
    return signed(request, json.dumps(REPORT | {"revision": 8}).encode())


async def answer_error(request: web.Request) -> web.StreamResponse:
    return web.Response(status=500)


async def answer_with_a_reset(request: web.Request) -> web.StreamResponse:
    assert request.transport is not None
    request.transport.abort()
    return web.Response()


MISBEHAVIOUR = {
    answer_never: ("timeout", "no complete answer in time"),
    answer_byte_by_byte: ("timeout", "no complete answer in time"),
    answer_without_end: ("too_large", "larger than 16384 bytes"),
    answer_with_a_bomb: ("malformed", "cannot be read"),
    answer_unsigned: ("unsigned", "not signed"),
    answer_signed_for_another_nonce: ("unsigned", "not signed"),
    answer_signed_for_another_status: ("unsigned", "not signed"),
    answer_nonsense: ("malformed", "cannot be read"),
    answer_with_long_texts: ("malformed", "cannot be read"),
    answer_that_another_is_in_force: ("mismatch", "enforces another"),
    answer_error: ("unsigned", r"status 500\) is not signed"),
    answer_with_a_reset: ("connection", "closed before"),
}


@pytest.mark.parametrize("misbehave", MISBEHAVIOUR, ids=lambda misbehave: misbehave.__name__)
async def test_misbehaving_pod_is_shown(
    misbehave: Any, serve: Serve, client: EngineClient, hasty_client: EngineClient, make: Any
) -> None:
    reason, message = MISBEHAVIOUR[misbehave]
    client = hasty_client if reason == "timeout" else client
    with pytest.raises(PushError, match=message) as caught:
        await client.push(await serve(misbehave), make.offer())
    assert caught.value.reason == reason


async def test_pod_whose_source_only_a_newer_operator_knows_is_not_unreachable(
    serve: Serve, client: EngineClient, make: Any
) -> None:
    offer = make.offer()
    report = {"bootId": "b", "epoch": 1, "revision": 1, "digest": offer.digest, "source": "Gossip", "since": 3}

    async def answer(request: web.Request) -> web.StreamResponse:
        return signed(request, json.dumps(report).encode())

    assert (await client.push(await serve(answer), offer)).source == "Gossip"


async def test_redirect_is_not_followed(serve: Serve, client: EngineClient, make: Any) -> None:
    visitors = []

    async def visit(request: web.Request) -> web.StreamResponse:
        visitors.append(request)
        return web.Response()

    elsewhere = await serve(visit)

    async def redirect(request: web.Request) -> web.StreamResponse:
        return web.Response(status=307, headers={"Location": elsewhere + request.path})

    with pytest.raises(PushError, match=r"status 307\) is not signed"):
        await client.push(await serve(redirect), make.offer())
    assert not visitors


async def test_nobody_there(client: EngineClient, make: Any, unused_tcp_port: int) -> None:
    with pytest.raises(PushError, match="cannot connect: Connection refused") as caught:
        await client.push(f"http://127.0.0.1:{unused_tcp_port}", make.offer())
    assert caught.value.state is PodState.UNREACHABLE


# ---- links


def states(pusher: Pusher) -> dict[str, PodState]:
    return {report.pod.name: report.state for report in pusher.reports(POOL)}


async def test_every_pod_gets_the_newest(pusher: Pusher, engine: Any, make: Any, changes: Any) -> None:
    engines = [await engine(f"pod-{index}") for index in range(3)]
    pods = [make.pod(f"pod-{index}", each.url) for index, each in enumerate(engines)]
    pusher.sync(POOL, pods, make.offer(1), {})
    assert not pusher.is_settled(POOL)
    await changes.until(lambda: pusher.is_settled(POOL))
    assert set(states(pusher).values()) == {PodState.APPLIED}
    for revision in range(2, 9):  # faster than the pods answer
        pusher.sync(POOL, pods, make.offer(revision), {})
    await changes.until(lambda: pusher.is_settled(POOL))
    assert [each.revision for each in engines] == [8, 8, 8]
    assert pusher.num_pending == 0
    assert all(len(each.enforced) < 8 for each in engines), "what is outdated is not pushed"


async def test_unreachable_pods_do_not_hold_up_the_others(
    pusher: Pusher, engine: Any, serve: Serve, make: Any, changes: Any
) -> None:
    good = await engine("good")
    pusher.sync(POOL, [make.pod("good", good.url)], make.offer(1), {})
    await changes.until(lambda: pusher.is_settled(POOL))
    black_hole = await serve(answer_never)
    lost = [make.pod(f"lost-{index}", black_hole) for index in range(MAX_UNPROVEN + 8)]
    pusher.sync(POOL, [*lost, make.pod("good", good.url)], make.offer(2), {})
    await changes.until(lambda: good.revision == 2)
    assert pusher.num_pending == len(lost)
    assert not any(report.outcome_of for report in pusher.reports(POOL) if report.pod.name != "good")


async def test_pod_that_comes_back_is_brought_up_to_date(
    pusher: Pusher, engine: Any, serve: Serve, make: Any, changes: Any
) -> None:
    stand_in = await engine()
    is_away = True

    async def sometimes(request: web.Request) -> web.StreamResponse:
        return web.Response(status=503) if is_away else await stand_in.handle(request)

    pod = make.pod("pod-0", await serve(sometimes))
    pusher.sync(POOL, [pod], make.offer(1), {})
    await changes.until(lambda: states(pusher)["pod-0"] is PodState.UNREACHABLE)
    assert (pusher.is_settled(POOL), pusher.num_pending) == (True, 1)
    is_away = False
    await changes.until(lambda: states(pusher)["pod-0"] is PodState.APPLIED)
    assert stand_in.revision == 1


async def test_restarted_pod_is_pushed_to_at_once(pusher: Pusher, engine: Any, make: Any, changes: Any) -> None:
    stand_in = await engine()
    pusher.sync(POOL, [make.pod("pod-0", stand_in.url)], make.offer(1), {})
    await changes.until(lambda: pusher.is_settled(POOL))
    first_boot = pusher.reports(POOL)[0].boot_id
    (stand_in.keys.parent / "last-good.json").unlink()
    stand_in.restart()
    pusher.sync(POOL, [make.pod("pod-0", stand_in.url, restarts=1)], make.offer(1), {})
    assert states(pusher) == {"pod-0": PodState.PENDING}
    await changes.until(lambda: pusher.is_settled(POOL))
    assert stand_in.revision == 1
    assert pusher.reports(POOL)[0].boot_id == stand_in.receiver.boot_id != first_boot


async def test_pod_that_loses_its_config_unseen_is_found_out(
    pusher: Pusher, engine: Any, make: Any, changes: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("evenhand_operator.pod_link.VERIFY_SECONDS", 0.05)
    stand_in = await engine()
    pusher.sync(POOL, [make.pod("pod-0", stand_in.url)], make.offer(1), {})
    await changes.until(lambda: pusher.is_settled(POOL))
    (stand_in.keys.parent / "last-good.json").unlink()
    stand_in.restart()
    assert stand_in.revision == 0
    await changes.until(lambda: pusher.reports(POOL)[0].boot_id == stand_in.receiver.boot_id)
    assert stand_in.revision == 1


async def test_what_stays_the_same_is_not_told(
    pusher: Pusher, engine: Any, make: Any, changes: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("evenhand_operator.pod_link.VERIFY_SECONDS", 0.01)
    stand_in = await engine()
    pusher.sync(POOL, [make.pod("pod-0", stand_in.url)], make.offer(1), {})
    await changes.until(lambda: pusher.is_settled(POOL))
    told = changes.count
    while stand_in.num_requests < 6:
        await asyncio.sleep(0.01)
    assert changes.count == told


async def test_gone_pod_is_left_alone(pusher: Pusher, engine: Any, make: Any, changes: Any) -> None:
    stand_in = await engine()
    pusher.sync(POOL, [make.pod("pod-0", stand_in.url)], make.offer(1), {})
    await changes.until(lambda: pusher.is_settled(POOL))
    pusher.sync(POOL, [], make.offer(2), {})
    assert pusher.reports(POOL) == []
    assert pusher.is_settled(POOL)


@pytest.mark.parametrize(("started", "is_known"), [(-10, True), (10, False)])
async def test_new_leader_knows_what_the_last_one_wrote(
    pusher: Pusher, serve: Serve, make: Any, started: int, is_known: bool
) -> None:
    """A container that started since then may have lost it."""
    now = time.time()
    row = PodStatus(name="pod-0", boot_id="b", epoch=3, revision=4, state=PodState.APPLIED, since=write_time(now))
    pod = make.pod("pod-0", await serve(answer_never), started_at=now + started)
    pusher.sync(POOL, [pod], make.offer(), {"pod-0": row})
    assert pusher.reports(POOL)[0].enforced == ((3, 4) if is_known else None)
    assert pusher.reports(POOL)[0].state is PodState.PENDING
