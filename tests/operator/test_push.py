"""The operator's half of the push, against the engine's real half and against pods that misbehave."""

import asyncio
import dataclasses
import gzip
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import jwt
import pytest
from aiohttp import web
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from evenhand_operator.engine_client import EngineClient, PushError
from evenhand_operator.objects import write_time
from evenhand_operator.pod_prover import PodProver
from evenhand_operator.pusher import MAX_LOST, MAX_NEW, MAX_PROVEN, Pusher
from evenhand_policy.config import Fairness
from evenhand_policy.push_document import DocumentRejectedError, understood_members
from evenhand_policy.push_protocol import (
    POD_TOKEN_HEADER,
    SIGNATURE_HEADER,
    EngineReport,
    sign_answer,
)
from evenhand_policy.signatures import public_text
from evenhand_policy.status import PodState, PodStatus
from evenhand_policy.version import Version
from harness.virtual_time import VirtualTime

BOOT_KEY = Ed25519PrivateKey.from_private_bytes(b"process." * 4)
POOL = ("inference", "default")
Serve = Callable[[Callable[[web.Request], Awaitable[web.StreamResponse]]], Awaitable[str]]


@pytest.fixture
def deleted() -> set[str]:
    """Uids of pods that there are no more."""
    return set()


@pytest.fixture
async def pusher(client: EngineClient, changes: Any, deleted: set[str]) -> AsyncIterator[Pusher]:
    async with asyncio.TaskGroup() as tasks:
        pusher = Pusher(client, tasks, changes.notify, lambda uid: uid not in deleted)
        yield pusher
        pusher.drop(POOL)


async def push(client: EngineClient, pod: Any, offer: Any) -> EngineReport:
    """As a link does at first, without a canary."""
    known = await client.read(pod, offer)
    return await client.send(pod, offer, known.boot_id)


async def test_engine_enforces_what_is_pushed(engine: Any, client: EngineClient, make: Any) -> None:
    stand_in = await engine()
    pod = make.pod("pod-0", stand_in.url)
    report = await push(client, pod, make.offer(3, epoch=2, num_replicas=5))
    assert (report.epoch, report.revision, report.boot_id) == (2, 3, stand_in.receiver.boot_id)
    config, num_replicas = stand_in.enforced[-1]
    assert (config.tenants[0].weight, num_replicas) == (4, 5)
    assert (await client.read(pod, make.offer(3, epoch=2))).revision == 3


async def test_version_and_replicas_go_without_the_document(engine: Any, client: EngineClient, make: Any) -> None:
    stand_in = await engine()
    pod = make.pod("pod-0", stand_in.url)
    known = await push(client, pod, make.offer(3, epoch=2, num_replicas=5))
    report = await client.relabel(pod, make.offer(1, epoch=3, num_replicas=6), known.boot_id)
    assert (report.epoch, report.revision, report.num_replicas) == (3, 1, 6)
    assert stand_in.enforced[-1][1] == 6
    with pytest.raises(PushError) as caught:
        await client.relabel(pod, make.offer(2, epoch=3, weight=9), known.boot_id)
    assert (caught.value.reason, stand_in.revision) == ("absent", 1)


async def test_engine_that_has_newer_says_so(engine: Any, client: EngineClient, make: Any) -> None:
    stand_in = await engine()
    pod = make.pod("pod-0", stand_in.url)
    await push(client, pod, make.offer(9, epoch=7))
    with pytest.raises(PushError) as caught:
        await push(client, pod, make.offer(10, epoch=6))
    assert (caught.value.state, caught.value.reason) == (PodState.REJECTED, "outdated")
    assert caught.value.report is not None
    assert (caught.value.report.epoch, caught.value.report.revision) == (7, 9)


async def test_rejection_carries_the_path(engine: Any, client: EngineClient, make: Any) -> None:
    stand_in = await engine()
    with pytest.raises(PushError, match=r"tenants\[0\].weight: .* \(status 422\)") as caught:
        await push(client, make.pod("pod-0", stand_in.url), make.offer(weight=0))
    assert (caught.value.state, caught.value.reason) == (PodState.REJECTED, "rejected")


async def test_pod_that_does_not_know_the_key_is_shown(engine: Any, client: EngineClient, make: Any) -> None:
    stand_in = await engine(key=Ed25519PrivateKey.generate())
    pod = make.pod("pod-0", stand_in.url)
    with pytest.raises(PushError, match="does not know the operator's key") as caught:
        await push(client, pod, make.offer())
    assert (caught.value.state, caught.value.reason) == (PodState.REJECTED, "unauthorized")
    assert stand_in.revision == 0
    stand_in.trust(Ed25519PrivateKey.generate(), make.key)  # the kubelet has brought the new keys
    assert (await push(client, pod, make.offer())).revision == 1


async def test_request_to_one_pod_is_worth_nothing_at_another(engine: Any, client: EngineClient, make: Any) -> None:
    """Neither a document nor the token of the other pod can be had by passing on what the operator sent."""
    other = await engine("pod-1")
    with pytest.raises(PushError, match="takes itself for another pod"):
        await client.read(make.pod("pod-0", other.url), make.offer())
    assert other.revision == 0


@pytest.mark.parametrize(
    ("forge", "problem"),
    [
        (lambda make: "", "it has no token"),
        (lambda make: make.pod_token("uid-pod-1"), "its token is of another pod"),
        (lambda make: make.pod_token("uid-pod-0", Ed25519PrivateKey.generate()), "its token is not valid"),
        (lambda make: make.pod_token("uid-pod-0", aud=["evenhand"]), "its token is not valid"),
        (lambda make: make.pod_token("uid-pod-0", iss="https://elsewhere"), "its token is not valid"),
        (lambda make: make.pod_token("uid-pod-0", exp=1), "its token is not valid"),
        (lambda make: make.pod_token("uid-pod-0", **{"kubernetes.io": {"pod": None}}), "its token is of another pod"),
        (lambda make: "a.b.c", "its token is not valid"),
    ],
)
async def test_who_cannot_prove_to_be_the_pod_is_sent_nothing(
    serve: Serve, client: EngineClient, make: Any, forge: Any, problem: str
) -> None:
    async def answer(request: web.Request) -> web.StreamResponse:
        return signed(request, json.dumps(REPORT).encode(), **{POD_TOKEN_HEADER: forge(make)})

    with pytest.raises(PushError, match=problem) as caught:
        await client.read(make.pod("pod-0", await serve(answer)), make.offer())
    assert (caught.value.state, caught.value.reason) == (PodState.REJECTED, "unproven")


def test_without_the_cluster_s_keys_nobody_is_believed(make: Any) -> None:
    token, pod = make.pod_token("uid-pod-0"), make.pod("pod-0")
    assert PodProver(lambda: make.issuer).problem(token, pod) is None
    assert "is not known" in str(PodProver(lambda: None).problem(token, pod))


# ---- pods that misbehave


def signed(request: web.Request, body: bytes, status: int = 200, **headers: str) -> web.Response:
    """An answer as an engine would sign it."""
    signature = sign_answer(BOOT_KEY, nonce_of(request), status, body)
    return web.Response(body=body, status=status, headers={SIGNATURE_HEADER: signature, **headers})


def nonce_of(request: web.Request) -> str:
    return str(jwt.decode(request.headers["Authorization"].split()[1], options={"verify_signature": False})["jti"])


BOOT_ID = public_text(BOOT_KEY)
REPORT = {"bootId": BOOT_ID, "epoch": 1, "revision": 1, "digest": "sha256:0", "source": "Push"}


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
    return web.Response(body=body, headers={SIGNATURE_HEADER: sign_answer(BOOT_KEY, "0" * 32, 200, body)})


async def answer_signed_for_another_status(request: web.Request) -> web.StreamResponse:
    body = json.dumps(REPORT).encode()
    signature = sign_answer(BOOT_KEY, nonce_of(request), 422, body)
    return web.Response(body=body, headers={SIGNATURE_HEADER: signature})


async def answer_as_another_process(request: web.Request) -> web.StreamResponse:
    return signed(request, json.dumps(REPORT | {"bootId": public_text(Ed25519PrivateKey.generate())}).encode())


async def answer_signed_by_another_than_it_says(request: web.Request) -> web.StreamResponse:
    body = json.dumps(REPORT).encode()
    signature = sign_answer(Ed25519PrivateKey.generate(), nonce_of(request), 200, body)
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
    answer_without_end: ("too_large", "larger than 32768 bytes"),
    answer_with_a_bomb: ("malformed", "cannot be read"),
    answer_unsigned: ("unsigned", "not signed"),
    answer_signed_for_another_nonce: ("unsigned", "not signed"),
    answer_signed_for_another_status: ("unsigned", "not signed"),
    answer_as_another_process: ("unsigned", "not signed by the engine"),
    answer_signed_by_another_than_it_says: ("unsigned", "not signed by the engine"),
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
        await client.send(make.pod("pod-0", await serve(misbehave)), make.offer(), BOOT_ID)
    assert caught.value.reason == reason


async def test_pod_whose_source_only_a_newer_operator_knows_is_not_unreachable(
    serve: Serve, client: EngineClient, make: Any
) -> None:
    offer = make.offer()
    report = REPORT | {"digest": offer.document.digest, "source": "Gossip", "since": 3}

    async def answer(request: web.Request) -> web.StreamResponse:
        return signed(request, json.dumps(report).encode())

    pod = make.pod("pod-0", await serve(answer))
    assert (await client.send(pod, offer, BOOT_ID)).source == "Gossip"


async def test_redirect_is_not_followed(serve: Serve, client: EngineClient, make: Any) -> None:
    visitors = []

    async def visit(request: web.Request) -> web.StreamResponse:
        visitors.append(request)
        return web.Response()

    elsewhere = await serve(visit)

    async def redirect(request: web.Request) -> web.StreamResponse:
        return web.Response(status=307, headers={"Location": elsewhere + request.path})

    with pytest.raises(PushError, match=r"status 307\) is not signed"):
        await client.send(make.pod("pod-0", await serve(redirect)), make.offer(), BOOT_ID)
    assert not visitors


async def test_nobody_there(client: EngineClient, make: Any, unused_tcp_port: int) -> None:
    with pytest.raises(PushError, match="cannot connect: Connection refused") as caught:
        await client.read(make.pod("pod-0", f"http://127.0.0.1:{unused_tcp_port}"), make.offer())
    assert caught.value.state is PodState.UNREACHABLE


# ---- links


def states(pusher: Pusher) -> dict[str, PodState]:
    return {report.pod.name: report.state for report in pusher.reports(POOL)}


@pytest.fixture(autouse=True)
def quick_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("evenhand_operator.pod_link.TRIAL_SECONDS", 0.01)


async def test_every_pod_gets_the_newest(pusher: Pusher, engine: Any, make: Any, changes: Any) -> None:
    engines = [await engine(f"pod-{index}") for index in range(3)]
    pods = [make.pod(f"pod-{index}", each.url) for index, each in enumerate(engines)]
    pusher.sync(POOL, pods, make.offer(1), {})
    assert not pusher.is_settled(POOL)
    await changes.until(lambda: pusher.is_settled(POOL))
    assert set(states(pusher).values()) == {PodState.APPLIED}
    for revision in range(2, 9):  # faster than the pods answer
        pusher.sync(POOL, pods, make.offer(revision, weight=revision), {})
    await changes.until(lambda: pusher.is_settled(POOL))
    assert [each.revision for each in engines] == [8, 8, 8]
    assert pusher.num_pending == 0
    assert all(len(each.enforced) < 8 for each in engines), "what is outdated is not pushed"


async def test_pod_that_has_the_document_is_not_sent_it(pusher: Pusher, engine: Any, make: Any, changes: Any) -> None:
    """A new leader, another number of pods: one small request each."""
    engines = [await engine(f"pod-{index}") for index in range(3)]
    pods = [make.pod(f"pod-{index}", each.url) for index, each in enumerate(engines)]
    pusher.sync(POOL, pods, make.offer(1, num_replicas=2), {})
    await changes.until(lambda: pusher.is_settled(POOL))
    pusher.drop(POOL)
    for each in engines:
        each.requests.clear()
    pusher.sync(POOL, pods, make.offer(1, epoch=2, num_replicas=2), {})
    await changes.until(lambda: pusher.is_settled(POOL))
    assert [each.requests for each in engines] == [["GET", "PATCH"]] * 3
    pusher.sync(POOL, pods, make.offer(2, epoch=2, num_replicas=3), {})
    await changes.until(lambda: pusher.is_settled(POOL))
    assert [each.requests for each in engines] == [["GET", "PATCH", "PATCH"]] * 3
    assert [each.enforced[-1][1] for each in engines] == [3, 3, 3]


async def test_pod_that_enforces_what_is_offered_is_told_nothing(
    pusher: Pusher, engine: Any, make: Any, changes: Any
) -> None:
    stand_in = await engine()
    pod = make.pod("pod-0", stand_in.url)
    pusher.sync(POOL, [pod], make.offer(1), {})
    await changes.until(lambda: pusher.is_settled(POOL))
    pusher.drop(POOL)
    stand_in.requests.clear()
    pusher.sync(POOL, [pod], make.offer(1), {})
    await changes.until(lambda: pusher.is_settled(POOL))
    assert (stand_in.requests, states(pusher)["pod-0"]) == (["GET"], PodState.APPLIED)


async def test_unreachable_pods_do_not_hold_up_the_others(
    pusher: Pusher, engine: Any, serve: Serve, make: Any, changes: Any
) -> None:
    good = await engine("good")
    pusher.sync(POOL, [make.pod("good", good.url)], make.offer(1), {})
    await changes.until(lambda: pusher.is_settled(POOL))
    black_hole = await serve(answer_never)
    lost = [make.pod(f"lost-{index}", black_hole) for index in range(MAX_PROVEN + MAX_NEW + MAX_LOST)]
    pusher.sync(POOL, [*lost, make.pod("good", good.url)], make.offer(2, weight=5), {})
    await changes.until(lambda: good.revision == 2)
    await changes.until(lambda: pusher.num_pending == len(lost))
    assert not any(report.outcome_of for report in pusher.reports(POOL) if report.pod.name != "good")


class Distant:
    """Stands for EngineClient: pods that are lost take five seconds to be given up, others enforce what they should."""

    async def read(self, pod: Any, offer: Any) -> EngineReport:
        if pod.name.startswith("lost"):
            await asyncio.sleep(5)
            raise PushError(PodState.UNREACHABLE, "timeout", "no complete answer in time")
        (epoch, revision), digest, num_replicas = offer.assignment
        return EngineReport(
            boot_id="b", epoch=epoch, revision=revision, digest=digest, source="Push", num_replicas=num_replicas
        )


def test_new_pods_do_not_queue_behind_lost_ones(virtual_time: VirtualTime, make: Any) -> None:
    """However many of those there are."""

    async def scenario() -> PodState:
        async with asyncio.TaskGroup() as tasks:
            pusher = Pusher(Distant(), tasks, lambda *_: None, lambda _: True, virtual_time.clock)  # type: ignore[arg-type]
            lost = [make.pod(f"lost-{index}") for index in range(16 * MAX_LOST)]
            pusher.sync(POOL, lost, make.offer(1), {})
            await asyncio.sleep(200)
            assert set(states(pusher).values()) == {PodState.UNREACHABLE}
            pusher.sync(POOL, [*lost, make.pod("new")], make.offer(1), {})
            await asyncio.sleep(0.5)
            state = states(pusher)["new"]
            pusher.drop(POOL)
            return state

    assert virtual_time.run(scenario()) is PodState.APPLIED


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


async def test_what_generates_is_told_and_told_anew(pusher: Pusher, engine: Any, make: Any, changes: Any) -> None:
    """A sidecar knows which engine it stands before only when that has started."""
    stand_in = await engine()
    stand_in.backend = "unknown"
    pod = make.pod("pod-0", stand_in.url)
    pusher.sync(POOL, [pod], make.offer(1), {})
    await changes.until(lambda: pusher.is_settled(POOL))
    assert pusher.reports(POOL)[0].backend == "unknown"
    stand_in.backend = "sglang"
    pusher.sync(POOL, [pod], make.offer(2), {})
    await changes.until(lambda: pusher.reports(POOL)[0].backend == "sglang")


async def test_restarted_pod_is_pushed_to_at_once(pusher: Pusher, engine: Any, make: Any, changes: Any) -> None:
    stand_in = await engine()
    pusher.sync(POOL, [make.pod("pod-0", stand_in.url)], make.offer(1), {})
    await changes.until(lambda: pusher.is_settled(POOL))
    first_boot = pusher.reports(POOL)[0].boot_id
    stand_in.last_good.unlink()
    stand_in.restart()
    pusher.sync(POOL, [make.pod("pod-0", stand_in.url, restarts=1)], make.offer(1), {})
    assert states(pusher) == {"pod-0": PodState.PENDING}
    await changes.until(lambda: pusher.is_settled(POOL))
    assert stand_in.revision == 1
    assert pusher.reports(POOL)[0].boot_id == stand_in.receiver.boot_id != first_boot


async def test_process_that_took_another_s_place_is_proved_anew(
    pusher: Pusher, engine: Any, make: Any, changes: Any
) -> None:
    stand_in = await engine()
    pod = make.pod("pod-0", stand_in.url)
    pusher.sync(POOL, [pod], make.offer(1), {})
    await changes.until(lambda: pusher.is_settled(POOL))
    stand_in.restart()
    stand_in.requests.clear()
    pusher.sync(POOL, [pod], make.offer(2), {})
    await changes.until(lambda: pusher.is_settled(POOL) and states(pusher)["pod-0"] is PodState.APPLIED)
    assert stand_in.requests == ["PATCH", "GET"], "what it answered to the first was not believed, but it had obeyed"
    assert pusher.reports(POOL)[0].boot_id == stand_in.receiver.boot_id


@pytest.mark.parametrize("told", [{"weight": 9}, {"num_replicas": 7}, {"epoch": 2}])
async def test_pod_that_enforces_something_else_unseen_is_found_out(
    pusher: Pusher, engine: Any, make: Any, changes: Any, monkeypatch: pytest.MonkeyPatch, told: Any
) -> None:
    """Another document, another number of replicas: whatever differs from what was offered."""
    monkeypatch.setattr("evenhand_operator.pod_link.VERIFY_SECONDS", 0.05)
    stand_in = await engine()
    pod = make.pod("pod-0", stand_in.url)
    pusher.sync(POOL, [pod], make.offer(1), {})
    await changes.until(lambda: pusher.is_settled(POOL))
    in_force = stand_in.receiver.in_force
    other = make.offer(1, **told)
    in_force.document = dataclasses.replace(
        in_force.document,
        assignment=other.assignment._replace(
            version=in_force.assignment.version if "epoch" not in told else Version(2, 1)
        ),
    )
    await changes.until(lambda: states(pusher)["pod-0"] is PodState.REJECTED)
    [report] = pusher.reports(POOL)
    assert report.reason == "outdated", "and the leader goes on above it"


async def test_pod_that_loses_its_config_unseen_is_found_out(
    pusher: Pusher, engine: Any, make: Any, changes: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("evenhand_operator.pod_link.VERIFY_SECONDS", 0.05)
    stand_in = await engine()
    pusher.sync(POOL, [make.pod("pod-0", stand_in.url)], make.offer(1), {})
    await changes.until(lambda: pusher.is_settled(POOL))
    stand_in.last_good.unlink()
    stand_in.restart()
    assert stand_in.revision == 0
    await changes.until(lambda: stand_in.revision == 1)
    assert pusher.reports(POOL)[0].boot_id == stand_in.receiver.boot_id


async def test_what_stays_the_same_is_not_told(
    pusher: Pusher, engine: Any, make: Any, changes: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("evenhand_operator.pod_link.VERIFY_SECONDS", 0.01)
    stand_in = await engine()
    pusher.sync(POOL, [make.pod("pod-0", stand_in.url)], make.offer(1), {})
    await changes.until(lambda: pusher.is_settled(POOL))
    told = changes.count
    while len(stand_in.requests) < 8:
        await asyncio.sleep(0.01)
    assert changes.count == told


async def test_pod_that_enforces_the_newest_is_left_alone_until_it_is_asked(
    pusher: Pusher, engine: Any, make: Any, changes: Any
) -> None:
    stand_in = await engine()
    pod = make.pod("pod-0", stand_in.url)
    for revision in (1, 2):
        pusher.sync(POOL, [pod], make.offer(revision, weight=revision), {})
        await changes.until(lambda: pusher.is_settled(POOL))
    asked = len(stand_in.requests)
    await asyncio.sleep(0.2)
    assert len(stand_in.requests) == asked


async def test_gone_pod_is_left_alone(pusher: Pusher, engine: Any, make: Any, changes: Any) -> None:
    stand_in = await engine()
    pusher.sync(POOL, [make.pod("pod-0", stand_in.url)], make.offer(1), {})
    await changes.until(lambda: pusher.is_settled(POOL))
    pusher.sync(POOL, [], make.offer(2), {})
    assert pusher.reports(POOL) == []
    assert pusher.is_settled(POOL)
    assert pusher.num_pending == 0


async def test_pod_that_is_not_ready_yet_is_pushed_to(pusher: Pusher, engine: Any, make: Any, changes: Any) -> None:
    """It becomes ready by that; then it is the same pod, and asked nothing again."""
    stand_in = await engine()
    pusher.sync(POOL, [make.pod("pod-0", stand_in.url, ready=False)], make.offer(1), {})
    await changes.until(lambda: pusher.is_settled(POOL))
    assert stand_in.revision == 1
    asked = len(stand_in.requests)
    pusher.sync(POOL, [make.pod("pod-0", stand_in.url)], make.offer(1), {})
    assert pusher.reports(POOL)[0].pod.ready_since is not None
    await asyncio.sleep(0.05)
    assert len(stand_in.requests) == asked


async def test_pod_that_moves_is_followed(pusher: Pusher, engine: Any, make: Any, changes: Any) -> None:
    stand_in = await engine()
    pusher.sync(POOL, [make.pod("pod-0", "http://127.0.0.1:1")], make.offer(1), {})
    await changes.until(lambda: pusher.is_settled(POOL))
    pusher.sync(POOL, [make.pod("pod-0", stand_in.url)], make.offer(1), {})
    await changes.until(lambda: stand_in.revision == 1)


async def test_pod_is_not_sent_what_it_does_not_understand(
    pusher: Pusher, engine: Any, make: Any, changes: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    older = understood_members() - {"tenants.fairness"}
    monkeypatch.setattr("evenhand_engine.frontend.push_receiver.understood_members", lambda: older)
    stand_in = await engine()
    pod = make.pod("pod-0", stand_in.url)
    pusher.sync(POOL, [pod], make.offer(1, fairness=Fairness.PER_USER), {})
    await changes.until(lambda: pusher.reports(POOL)[0].understands == older)
    assert not pusher.is_settled(POOL)
    pusher.sync(POOL, [pod], make.offer(2, fairness=Fairness.PER_USER, understood=older), {})
    await changes.until(lambda: pusher.is_settled(POOL))
    assert stand_in.requests.count("PUT") == 1
    assert stand_in.revision == 2


async def test_older_pod_is_sent_what_uses_nothing_newer(
    pusher: Pusher, engine: Any, make: Any, changes: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At once: with nothing to leave out, no other document will be made for it."""
    older = understood_members() - {"tenants.fairness"}
    monkeypatch.setattr("evenhand_engine.frontend.push_receiver.understood_members", lambda: older)
    stand_in = await engine()
    pusher.sync(POOL, [make.pod("pod-0", stand_in.url)], make.offer(1), {})
    await changes.until(lambda: pusher.is_settled(POOL))
    assert stand_in.revision == 1


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


# ---- the first pod with a new document


async def start_pool(
    pusher: Pusher, engine: Any, make: Any, changes: Any, count: int = 4
) -> tuple[list[Any], list[Any]]:
    """Engines and pods that enforce revision 1."""
    engines = [await engine(f"pod-{index}") for index in range(count)]
    pods = [make.pod(f"pod-{index}", each.url) for index, each in enumerate(engines)]
    pusher.sync(POOL, pods, make.offer(1), {})
    await changes.until(lambda: pusher.is_settled(POOL))
    for each in engines:
        each.requests.clear()
    return engines, pods


async def test_new_document_goes_to_one_pod_and_then_to_the_rest(
    pusher: Pusher, engine: Any, make: Any, changes: Any
) -> None:
    engines, pods = await start_pool(pusher, engine, make, changes)
    engines[0].ailment = "the core does not enforce it yet"
    pusher.sync(POOL, pods, make.offer(2, weight=5), {})
    await changes.until(lambda: engines[0].revision == 2)
    await asyncio.sleep(0.1)
    assert [each.revision for each in engines] == [2, 1, 1, 1]
    assert not pusher.is_proven(POOL, make.offer(weight=5).document.digest)
    engines[0].ailment = None
    await changes.until(lambda: pusher.is_settled(POOL))
    assert [each.revision for each in engines] == [2, 2, 2, 2]
    assert pusher.is_proven(POOL, make.offer(weight=5).document.digest)
    assert [each.requests.count("PUT") for each in engines] == [1, 1, 1, 1]


async def test_refusal_stops_the_rollout_until_there_is_another_document(
    pusher: Pusher, engine: Any, make: Any, changes: Any
) -> None:
    engines, pods = await start_pool(pusher, engine, make, changes)
    pusher.sync(POOL, pods, make.offer(2, weight=0), {})
    await changes.until(lambda: bool(pusher.stopped(POOL)))
    assert pusher.stopped(POOL).startswith("pod pod-1 does not take the document: tenants[0].weight")
    await asyncio.sleep(0.1)
    assert [each.requests.count("PUT") > 0 for each in engines] == [True, True, False, False], (
        "the second was asked too"
    )
    pusher.sync(POOL, pods, make.offer(3, weight=5), {})
    await changes.until(lambda: all(each.revision == 3 for each in engines))
    assert pusher.stopped(POOL) == ""


async def test_pod_that_refuses_alone_keeps_nobody_from_the_document(
    pusher: Pusher, engine: Any, make: Any, changes: Any
) -> None:
    engines, pods = await start_pool(pusher, engine, make, changes)

    def refuse(_: Any) -> None:
        raise DocumentRejectedError("tenants", "I do not want to")

    engines[0].receiver.in_force.on_change(refuse)
    pusher.sync(POOL, pods, make.offer(2, weight=5), {})
    await changes.until(lambda: [each.revision for each in engines] == [1, 2, 2, 2])
    assert pusher.stopped(POOL) == ""
    await changes.until(lambda: states(pusher)["pod-0"] is PodState.REJECTED)


async def test_pod_that_is_ill_with_the_document_stops_the_rollout(
    pusher: Pusher, engine: Any, make: Any, changes: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("evenhand_operator.pod_link.LONGEST_TRIAL_SECONDS", 0.05)
    engines, pods = await start_pool(pusher, engine, make, changes)
    engines[0].ailment = "no progress"
    pusher.sync(POOL, pods, make.offer(2, weight=5), {})
    await changes.until(
        lambda: pusher.stopped(POOL) == "pod pod-0 does not take the document: it is not well: no progress"
    )
    assert [each.revision for each in engines] == [2, 1, 1, 1]
    engines[0].ailment = None
    await changes.until(lambda: pusher.is_settled(POOL) and not pusher.stopped(POOL))
    assert [each.revision for each in engines] == [2, 2, 2, 2], "it was only slow"


@pytest.mark.parametrize("seen_by", ["the connection", "the container"])
async def test_pod_that_dies_of_the_document_stops_the_rollout(
    pusher: Pusher, engine: Any, make: Any, changes: Any, deleted: set[str], seen_by: str
) -> None:
    engines, pods = await start_pool(pusher, engine, make, changes)
    deaths = 0

    def die(config: Any) -> None:
        nonlocal deaths
        deaths += 1
        engines[0].restart()
        if seen_by == "the connection":
            raise RuntimeError

    engines[0].receiver.in_force.on_change(die)
    engines[0].ailment = "dying"
    pusher.sync(POOL, pods, make.offer(2, weight=5), {})
    await changes.until(lambda: deaths == 1)
    pods[0] = make.pod("pod-0", engines[0].url, restarts=1)
    pusher.sync(POOL, pods, make.offer(2, weight=5), {})
    await changes.until(lambda: bool(pusher.stopped(POOL)))
    assert "ended when it was sent the document" in pusher.stopped(POOL)
    await asyncio.sleep(0.1)
    assert [each.revision for each in engines] == [1, 1, 1, 1]
    deleted.add(pods[0].uid)
    pusher.sync(POOL, pods[1:], make.offer(2, weight=5), {})  # it was deleted: perhaps it was that
    await changes.until(lambda: [each.revision for each in engines[1:]] == [2, 2, 2])


async def test_new_pod_is_given_at_once_what_others_enforce(
    pusher: Pusher, engine: Any, make: Any, changes: Any
) -> None:
    _, pods = await start_pool(pusher, engine, make, changes, 2)
    new = await engine("new")
    pusher.sync(POOL, [*pods, make.pod("new", new.url)], make.offer(2, num_replicas=3), {})
    await changes.until(lambda: pusher.is_settled(POOL))
    assert new.requests == ["GET", "PUT"]
