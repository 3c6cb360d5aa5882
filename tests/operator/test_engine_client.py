"""Requests to one pod, against the engine's real half of the push and against pods that misbehave."""

import asyncio
import gzip
import json
from collections.abc import Awaitable, Callable
from typing import Any

import jwt
import pytest
from aiohttp import web
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from evenhand_operator.engine_client import EngineClient, PushError
from evenhand_operator.pod_prover import PodProver
from evenhand_policy.push_protocol import (
    POD_TOKEN_HEADER,
    SIGNATURE_HEADER,
    EngineReport,
    sign_answer,
)
from evenhand_policy.signatures import public_text
from evenhand_policy.status import PodState

BOOT_KEY = Ed25519PrivateKey.from_private_bytes(b"process." * 4)
Serve = Callable[[Callable[[web.Request], Awaitable[web.StreamResponse]]], Awaitable[str]]


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
    await asyncio.Event().wait()
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


async def answer_with_a_number_that_no_status_can_hold(request: web.Request) -> web.StreamResponse:
    return signed(request, json.dumps(REPORT | {"revision": 2**63}).encode())


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
    answer_with_a_number_that_no_status_can_hold: ("malformed", "cannot be read"),
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
