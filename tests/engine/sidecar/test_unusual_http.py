"""HTTP of clients that is seldom seen and legal, byte by byte; and what only looks legal."""

import asyncio
import json
from urllib.parse import urlsplit

import pytest

from evenhand_policy.config import SchedulerConfig, TenantConfig
from evenhand_policy.credentials import key_hash

from .conftest import DONE, TEAM_KEY, WAIT_SECONDS, ScriptedUpstream, Sidecar, say_three

BODY = b'{"stream": true, "messages": []}'


async def talk(sidecar: Sidecar, *sent: bytes) -> bytes:
    """All that is answered to these bytes, until the connection is closed; each part is sent when the last was answered."""
    url = urlsplit(sidecar.url)
    reader, writer = await asyncio.open_connection(url.hostname, url.port)
    answer = b""
    async with asyncio.timeout(WAIT_SECONDS):
        for part in sent[:-1]:
            writer.write(part)
            answer += await reader.readuntil(b"\r\n\r\n")
        writer.write(sent[-1])
        answer += await reader.read()
    writer.close()
    return answer


def post(
    target: bytes = b"/v1/chat/completions", *headers: bytes, body: bytes = BODY, method: bytes = b"POST"
) -> bytes:
    length = b"Content-Length: %d" % len(body)
    lines = (method + b" " + target + b" HTTP/1.1", b"Host: x", b"Content-Type: application/json", length, *headers)
    return b"\r\n".join((*lines, b"", body))


CLOSE = b"Connection: close"


def status_of(answer: bytes) -> int:
    return int(answer.split()[1])


def code_in(answer: bytes) -> str:
    return str(json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"])


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        (b"http://somewhere:1/v1/chat/completions?a=%2F", "/v1/chat/completions?a=%2F"),
        (b"HTTPS://x/v1/chat/completions", "/v1/chat/completions"),
        (b"http://x/?a=1", "/?a=1"),
        (b"/v1/%63hat/completions", "/v1/%63hat/completions"),
        (b"/v1/x//y;z=1/%25?q=http://x/../y", "/v1/x//y;z=1/%25?q=http://x/../y"),
        (b"/v1/a+b/%C3%A9%20:@!$&'()*,", "/v1/a+b/%C3%A9%20:@!$&'()*,"),
    ],
)
async def test_targets_in_any_form_reach_the_upstream_as_they_are(
    upstream: ScriptedUpstream, sidecar: Sidecar, target: bytes, expected: str
) -> None:
    upstream.script = say_three
    assert status_of(await talk(sidecar, post(target, CLOSE))) == 200
    assert upstream.received[-1][0] == expected
    is_known = b"completions" in target
    assert ("stream_options" in upstream.body()) == is_known, "its path was read as the engine reads it"
    await sidecar.settled()


@pytest.mark.parametrize(
    ("target", "status"),
    [
        (b"/v1/../sleep", 400),
        (b"/v1/%2e%2E/sleep", 400),
        (b"/x%2F..%2Fsleep", 400),
        (b"/./sleep", 400),
        (b"/sleep/.", 403),
        (b"http://x/sleep", 403),
        (b"//sleep", 403),
        (b"/%73leep?level=1", 403),
        (b"*", 404),
        (b"somewhere:443", 400),
    ],
)
@pytest.mark.parametrize("method", [b"POST", b"GET"])
async def test_no_form_of_a_path_that_changes_the_engine_passes(
    upstream: ScriptedUpstream, sidecar: Sidecar, target: bytes, status: int, method: bytes
) -> None:
    assert status_of(await talk(sidecar, post(target, CLOSE, method=method))) in (status, 400)
    assert not upstream.received


@pytest.mark.parametrize(("method", "status"), [(b"TRACE", 405), (b"CONNECT", 404)])
async def test_methods_that_are_no_request_of_a_resource_are_refused(
    upstream: ScriptedUpstream, sidecar: Sidecar, method: bytes, status: int
) -> None:
    """TRACE would be answered with the key that the upstream wants."""
    assert status_of(await talk(sidecar, post(b"/v1/models", CLOSE, method=method))) == status
    assert not upstream.received


@pytest.mark.parametrize(
    "headers",
    [
        (b"Content-Length: 32",),
        (b"Content-Length: 33",),
        (b"Transfer-Encoding: chunked",),
        (b"Content-Length : 32",),
        (b"Content-Length: +32",),
        (b"X-Folded: a\r\n b",),
        (b"X\x00: a",),
    ],
)
async def test_what_two_servers_may_read_in_two_ways_is_refused(
    upstream: ScriptedUpstream, sidecar: Sidecar, headers: tuple[bytes, ...]
) -> None:
    answer = await talk(sidecar, post(b"/v1/chat/completions", *headers, CLOSE))
    assert (status_of(answer), code_in(answer)) == (400, "invalid_http")
    assert not upstream.received


async def test_an_offer_of_another_protocol_need_not_be_taken(upstream: ScriptedUpstream, sidecar: Sidecar) -> None:
    """Java's client offers HTTP/2 so with its first request."""
    upstream.script = say_three
    offer = (b"Connection: Upgrade, HTTP2-Settings", b"Upgrade: h2c", b"HTTP2-Settings: AAEAAEAAAAIAAAABAAMAAABk")
    answer = await talk(sidecar, post(b"/v1/chat/completions", *offer), post(b"/v1/completions", CLOSE))
    assert answer.count(b"HTTP/1.1 200 OK") == 2 and answer.count(DONE) == 2
    assert [path for path, _, _ in upstream.received] == ["/v1/chat/completions", "/v1/completions"]
    assert not {"Upgrade", "HTTP2-Settings"} & set(upstream.received[0][1])
    await sidecar.settled()


async def test_after_a_websocket_is_refused_its_connection_serves(upstream: ScriptedUpstream, sidecar: Sidecar) -> None:
    key = b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ=="
    request = (b"GET /v1/realtime HTTP/1.1", b"Host: x", b"Connection: keep-alive, Upgrade", b"Upgrade: WebSocket", key)
    answer = await talk(sidecar, b"\r\n".join((*request, b"", b"")) + post(b"/v1/models", CLOSE, method=b"GET"))
    assert status_of(answer) == 501 and b"HTTP/1.1 200 OK" in answer
    assert [path for path, _, _ in upstream.received] == ["/v1/models"]


async def test_a_body_in_chunks_with_trailers_goes_on_with_its_length(
    upstream: ScriptedUpstream, sidecar: Sidecar
) -> None:
    upstream.script = say_three
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nTrailer: X-End\r\n"
    head += b"Transfer-Encoding: chunked\r\nConnection: close\r\nConnection: X-Mine\r\nX-Mine: 1\r\n\r\n"
    chunks = b"".join(b"1;name=value\r\n%c\r\n" % byte for byte in BODY) + b"0\r\nX-End: 1\r\n\r\n"
    answer = await talk(sidecar, head + chunks)
    assert status_of(answer) == 200 and DONE in answer
    names = set(upstream.received[-1][1])
    assert "Content-Length" in names and not {"Transfer-Encoding", "Trailer", "X-End", "X-Mine"} & names
    await sidecar.settled()


async def test_leave_to_send_is_given_once_and_to_nobody_who_is_refused(
    upstream: ScriptedUpstream, sidecar: Sidecar
) -> None:
    upstream.script = say_three
    request = post(b"/v1/chat/completions", b"Expect: 100-continue", CLOSE)
    answer = await talk(sidecar, request.removesuffix(BODY), BODY)
    assert answer.startswith(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\n") and answer.count(b"100 Continue") == 1
    assert "Expect" not in upstream.received[-1][1]
    sidecar.apply(SchedulerConfig(tenants=(TenantConfig(tenant_id="team", key_hashes=(key_hash(TEAM_KEY),)),)))
    stranger = post(b"/v1/chat/completions", b"Expect: 100-continue", b"Authorization: Bearer nobodys-key-0123", CLOSE)
    assert (await talk(sidecar, stranger)).startswith(b"HTTP/1.1 401 ")
    await sidecar.settled()


async def test_many_headers_pass_and_too_many_are_refused(upstream: ScriptedUpstream, sidecar: Sidecar) -> None:
    upstream.script = say_three
    for count, expected in ((100, 200), (1000, 400)):
        headers = (b"X-%d: %d" % (number, number) for number in range(count))
        answer = await talk(sidecar, post(b"/v1/chat/completions", *headers, CLOSE))
        assert status_of(answer) == expected
    assert len(upstream.received) == 1 and upstream.received[0][1]["X-99"] == "99"
    await sidecar.settled()


async def test_requests_may_follow_each_other_without_waiting(upstream: ScriptedUpstream, sidecar: Sidecar) -> None:
    upstream.script = say_three
    head = b"HEAD /v1/models HTTP/1.1\r\nHost: x\r\n\r\n"
    answer = await talk(sidecar, head + post() + post(b"/v1/models", method=b"GET", body=b"") + post(b"/x", CLOSE))
    assert answer.count(b"HTTP/1.1 200 OK") == 4 and answer.count(DONE) == 2
    assert [path for path, _, _ in upstream.received] == ["/v1/models", "/v1/chat/completions", "/v1/models", "/x"]
    await sidecar.settled()


async def test_an_answer_to_head_has_the_length_and_not_the_body(upstream: ScriptedUpstream, sidecar: Sidecar) -> None:
    async with sidecar.session.get(sidecar.url + "/v1/models") as whole:
        length = str(len(await whole.read()))
    async with sidecar.session.head(sidecar.url + "/v1/models") as response:
        assert (response.status, response.headers["Content-Length"], await response.read()) == (200, length, b"")


async def test_bytes_in_headers_that_are_no_ascii_do_no_harm(upstream: ScriptedUpstream, sidecar: Sidecar) -> None:
    upstream.script = say_three
    answer = await talk(sidecar, post(b"/v1/chat/completions", b"X-Name: Jos\xe9", b"X-Kept: \xc3\xa9", CLOSE))
    assert status_of(answer) == 200
    assert upstream.received[-1][1]["X-Kept"] == "é"
    await sidecar.settled()


async def test_a_client_that_leaves_amid_its_body_leaves_nothing(upstream: ScriptedUpstream, sidecar: Sidecar) -> None:
    url = urlsplit(sidecar.url)
    for request in (post()[:-5], post().replace(b"application/json", b"audio/wav")[:-5]):
        _, writer = await asyncio.open_connection(url.hostname, url.port)
        writer.write(request)
        await sidecar.until(lambda: sidecar.service.bodies.num_bytes("default") > 0)
        writer.close()
        await sidecar.until(lambda: sidecar.service.bodies.num_bytes("default") == 0)
    await sidecar.settled()
