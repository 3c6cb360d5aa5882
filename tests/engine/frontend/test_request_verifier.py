"""Whom an engine believes: signatures, nonces, times, keys; and who may read without."""

import base64

import jwt
import msgspec
import pytest

from evenhand_policy.bootstrap import KEYS_FILE
from evenhand_policy.push_document import encode_document, understood_members
from evenhand_policy.push_protocol import (
    POD_TOKEN_HEADER,
    REPORT_PATH,
    EngineReport,
    make_request,
)
from evenhand_policy.version import Assignment, Version

from .conftest import CHAT, KEY, NEXT_KEY, POOL, STRANGER, UID, Engine


async def test_unknown_key_is_refused_and_answered_unsigned(engine: Engine) -> None:
    status, answer = await engine.put(key=STRANGER)
    assert status == 401
    assert set(answer) == {"problem"}
    assert engine.enforced == []


@pytest.mark.parametrize(
    "authorization",
    ["", "Bearer", "Bearer x", "Bearer a.b.c", "Basic eDp5", "Bearer " + "x" * 5000, "Bearer \xe4.\xe4.\xe4"],
)
async def test_what_is_not_signed_is_refused(engine: Engine, authorization: str) -> None:
    status, _ = await engine.put(headers={"Authorization": authorization})
    assert status == 401
    assert engine.enforced == []


async def test_nothing_that_is_signed_can_be_changed(engine: Engine) -> None:
    signed = engine.sign("PUT", Assignment(Version(1, 1), encode_document(CHAT).digest, 1))["Authorization"]
    header, claims, signature = signed.removeprefix("Bearer ").split(".")
    changed = base64.urlsafe_b64decode(claims + "==").replace(b'"replicas":1', b'"replicas":9')
    forged = base64.urlsafe_b64encode(changed).decode().rstrip("=")
    unsigned = base64.urlsafe_b64encode(b'{"alg":"none","typ":"JWT"}').decode().rstrip("=")
    for token in (f"{header}.{forged}.{signature}", f"{unsigned}.{claims}.", f"{header}.{claims}.{signature[:-4]}AAAA"):
        assert (await engine.put(headers={"Authorization": f"Bearer {token}"}))[0] == 401
    assert engine.enforced == []


async def test_secret_key_cannot_be_made_of_the_public_one(engine: Engine) -> None:
    """A token signed by HMAC with what every pod knows."""
    public = KEY.public_key().public_bytes_raw()
    request = make_request(
        "PUT",
        UID,
        engine.now,
        cluster="c1",
        pool=POOL,
        assignment=Assignment(Version(1, 1), encode_document(CHAT).digest, 1),
    )
    token = jwt.encode(msgspec.to_builtins(request), public, algorithm="HS256")
    assert (await engine.put(headers={"Authorization": f"Bearer {token}"}))[0] == 401


async def test_request_cannot_be_replayed(engine: Engine) -> None:
    headers = engine.sign("PUT", Assignment(Version(1, 1), encode_document(CHAT).digest, 1))
    assert (await engine.put(headers=headers))[0] == 200
    status, answer = await engine.put(headers=headers)
    assert (status, answer) == (401, {"problem": "the request was sent before"})
    engine.now += 119  # its nonce is remembered for as long as its time is believed
    assert (await engine.put(headers=headers))[0] == 401


async def test_request_to_another_pod_is_refused(engine: Engine) -> None:
    status, answer = await engine.put(aud="uid-of-another-pod")
    assert (status, answer) == (401, {"problem": "the request is for another pod"})
    assert engine.enforced == []


@pytest.mark.parametrize(("skew", "status"), [(-59, 200), (59, 200), (-61, 401), (61, 401), (float("nan"), 401)])
async def test_request_is_of_now(engine: Engine, skew: float, status: int) -> None:
    answered, report = await engine.put(iat=engine.now + skew)
    assert answered == status
    if skew == 61:
        assert report.problem == "its time is more than 60 s from this engine's clock", (
            "the same words at every attempt"
        )


@pytest.mark.parametrize("change", [{"method": "GET"}, {"method": "PATCH"}, {"path": REPORT_PATH}])
async def test_signature_of_another_request_is_none_of_a_put(engine: Engine, change: dict[str, str]) -> None:
    headers = engine.sign("PUT", Assignment(Version(1, 1), encode_document(CHAT).digest, 1), **change)
    assert (await engine.put(headers=headers))[0] == 401


async def test_keys_are_rotated_without_a_restart(engine: Engine) -> None:
    engine.trust(KEY, NEXT_KEY)
    assert (await engine.put(CHAT, 1, key=KEY))[0] == 200
    assert (await engine.put(CHAT, 2, key=NEXT_KEY))[0] == 200
    engine.trust(NEXT_KEY)
    assert (await engine.put(CHAT, 3, key=KEY))[0] == 401
    assert (await engine.put(CHAT, 3, key=NEXT_KEY))[0] == 200


@pytest.mark.parametrize(
    "content", [b"", b"{}", b'{"keys": [{}]}', b'{"keys": [{"kty": "oct", "k": "c2VjcmV0"}]}', b"\xff"]
)
async def test_pod_that_knows_no_key_believes_nobody(engine: Engine, content: bytes) -> None:
    (engine.folder / "bootstrap" / KEYS_FILE).write_bytes(content)
    assert (await engine.put())[0] == 401


NOTHING = Assignment(Version(1, 1), "", 1)


async def test_signed_get_tells_what_is_in_force_and_proves_where(engine: Engine) -> None:
    await engine.put(CHAT, 3)
    async with engine.client.get(REPORT_PATH, headers=engine.sign("GET", NOTHING)) as response:
        report = msgspec.json.decode(await response.read(), type=EngineReport)
        assert response.headers[POD_TOKEN_HEADER] == (engine.folder / "token").read_text()
    assert report.revision == 3
    assert set(report.understands) == understood_members()


async def test_token_is_for_the_operator_alone(engine: Engine) -> None:
    async with engine.client.get(REPORT_PATH) as response:
        assert response.status == 200, "it is local"
        assert POD_TOKEN_HEADER not in response.headers
    for headers in (engine.sign("GET", NOTHING, STRANGER), engine.sign("GET", NOTHING, aud="uid-of-another-pod")):
        async with engine.client.get(REPORT_PATH, headers=headers) as response:
            assert response.status == 401
            assert POD_TOKEN_HEADER not in response.headers


async def test_stranger_reads_nothing_unsigned(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    async def get(path: str, headers: dict[str, str] | None = None) -> int:
        async with engine.client.get(path, headers=headers) as response:
            return response.status

    assert await get(REPORT_PATH) == await get("/debug") == 200
    monkeypatch.setattr("evenhand_engine.frontend.push_receiver.is_local", lambda _: False)
    assert await get(REPORT_PATH) == await get("/debug") == 401
    assert await get(REPORT_PATH, engine.sign("GET", NOTHING)) == 200
    assert await get("/debug", engine.sign("GET", NOTHING, path="/debug")) == 200
    assert await get("/debug?x=1", engine.sign("GET", NOTHING, path="/debug")) == 401
