"""Requests made to be counted, bounded or looked at less than they cost: what engines read leniently, a sidecar does too."""

import asyncio
import gzip
from typing import Any

import pytest
from aiohttp import web

from evenhand_engine.sidecar.body import MAX_CHOICES
from evenhand_policy.config import Limits, SchedulerConfig, TenantConfig
from evenhand_policy.credentials import key_hash

from .conftest import TEAM_KEY, WAIT_SECONDS, ScriptedUpstream, Sidecar, Start, say_three

KEY = {"Authorization": f"Bearer {TEAM_KEY}"}


def limited(**limits: int) -> SchedulerConfig:
    team = TenantConfig(tenant_id="team", key_hashes=(key_hash(TEAM_KEY),), limits=Limits(**limits))
    return SchedulerConfig(tenants=(team,))


@pytest.mark.parametrize(
    "raw",
    [
        b'{"max_tokens": 9000, "a": NaN}',
        b'{"max_tokens": 9000, "a": "\\ud800"}',
        b'\xef\xbb\xbf{"max_tokens": 9000}',
        '{"max_tokens": 9000}'.encode("utf-16"),
        b'{"max_tokens": 9000} {}',
        b'{"max_tokens": 9000,}',
    ],
    ids=["NaN", "surrogate", "byte order mark", "UTF-16", "two", "comma"],
)
@pytest.mark.parametrize("content_type", ["application/json", "application/x+json", "text/plain"])
async def test_what_only_some_parsers_take_is_refused(
    upstream: ScriptedUpstream, sidecar: Sidecar, raw: bytes, content_type: str
) -> None:
    if content_type == "text/plain" and raw.startswith(b"\xff"):
        pytest.skip("nobody takes it for JSON")
    async with sidecar.session.post(
        sidecar.url + "/completion", data=raw, headers={"Content-Type": content_type}
    ) as response:
        assert (response.status, (await response.json())["error"]["code"]) == (400, "invalid_json")
    assert not upstream.received


@pytest.mark.parametrize("content_type", ["text/plain", "audio/wav", "application/vnd.api+json", ""])
@pytest.mark.parametrize("is_chunked", [False, True])
async def test_an_object_is_looked_at_whatever_its_type_says(
    upstream: ScriptedUpstream, sidecar: Sidecar, content_type: str, is_chunked: bool
) -> None:
    upstream.script = say_three
    sidecar.apply(limited(max_output_tokens=7))
    raw = b' \n{"stream": true, "priority": -9, "prompt": "x"}'

    async def in_pieces() -> Any:
        yield raw

    data = in_pieces() if is_chunked else raw
    headers = KEY | {"Content-Type": content_type}
    async with sidecar.session.post(sidecar.url + "/completion", data=data, headers=headers) as response:
        assert response.status == 200
        await response.read()
    assert upstream.body() == {"stream": True, "prompt": "x", "n_predict": 7}
    await sidecar.settled()


async def test_a_packed_object_is_looked_at_too(upstream: ScriptedUpstream, sidecar: Sidecar) -> None:
    async def in_pieces() -> Any:
        yield gzip.compress(b'{"stream": true, "priority": -9}')

    upstream.script = say_three
    headers = {"Content-Type": "text/plain", "Content-Encoding": "gzip"}
    async with sidecar.session.post(sidecar.url + "/completion", data=in_pieces(), headers=headers) as response:
        assert response.status == 200
        await response.read()
    assert upstream.body() == {"stream": True} and "Content-Encoding" not in upstream.received[-1][1]


@pytest.mark.parametrize(
    ("path", "fields", "expected"),
    [
        ("/v1/chat/completions", {"max_completion_tokens": "oops"}, {"max_completion_tokens": 7}),
        ("/v1/completions", {"max_tokens": 7, "max_completion_tokens": [1]}, {"max_tokens": 7, "max_completion_tokens": 7}),
        ("/v1/completions", {"n": 2}, {"n": 2, "max_tokens": 7}),
        ("/v1/responses", {}, {"max_output_tokens": 7}),
        ("/completion", {"n_predict": -1}, {"n_predict": 7}),
        ("/infill", {}, {"n_predict": 7}),
        ("/v1/chat/completions", {"n_predict": 1}, {"n_predict": 1, "max_tokens": 7}),
        ("/generate", {"sampling_params": {"n": 2}}, {"sampling_params": {"n": 2, "max_new_tokens": 7}}),
    ],
)  # fmt: skip
async def test_the_policys_limit_is_the_only_one_that_goes_on(
    upstream: ScriptedUpstream, sidecar: Sidecar, path: str, fields: dict[str, Any], expected: dict[str, Any]
) -> None:
    async def answer(request: web.Request) -> web.StreamResponse:
        return web.json_response({"usage": {"prompt_tokens": 1, "completion_tokens": 1}})

    upstream.script = answer
    sidecar.apply(limited(max_output_tokens=7))
    async with sidecar.post(fields, path, headers=KEY) as response:
        assert response.status == 200
    assert upstream.body() == expected


async def test_each_answer_is_charged_and_takes_a_seat(upstream: ScriptedUpstream, start: Start) -> None:
    """Of 12 prompts 3 answers each: a request of the quota for each, all their tokens, and seats of the upstream."""
    release = asyncio.Event()

    async def answer(request: web.Request) -> web.StreamResponse:
        await release.wait()
        return web.json_response({"usage": {"prompt_tokens": 200_000, "completion_tokens": 36 * 50}})

    upstream.script = answer
    sidecar = await start(upstream.url, max_num_seqs=40)
    sidecar.apply(limited(requests_per_minute=50))
    several = asyncio.create_task(ask(sidecar, {"prompt": ["x"] * 12, "n": 3, "max_tokens": 50}, KEY))
    await sidecar.until(lambda: upstream.num_open == 1)
    others = [asyncio.create_task(ask(sidecar, {"prompt": "x", "max_tokens": 50})) for _ in range(10)]
    window = sidecar.upstream.dispatcher.window
    await sidecar.until(lambda: sidecar.upstream.dispatcher.request_table.num_waiting == 7)
    assert (window.num_seats_taken, window.num_in_flight) == (39, 4), "one seat is left for who has few"
    account = sidecar.service.admission.account("team")
    assert account.num_in_flight == 36 and account.requests is not None and account.requests.level(0.0) < 15
    release.set()
    async with asyncio.timeout(WAIT_SECONDS):
        assert [await several, *await asyncio.gather(*others)] == [200] * 11
    await sidecar.settled()
    assert sidecar.tokens("team") == (200_000, 36 * 50) and window.num_seats_taken == 0


async def test_a_limit_in_an_object_of_its_own_is_the_policys_too(upstream: ScriptedUpstream, sidecar: Sidecar) -> None:
    sidecar.apply(limited(max_output_tokens=7))
    async with sidecar.post({"sampling_params": {"max_new_tokens": 8}}, "/generate", headers=KEY) as response:
        assert (response.status, (await response.json())["error"]["code"]) == (400, "max_output_tokens")
    assert not upstream.received
    await sidecar.settled()


async def test_answers_of_one_body_count_against_the_concurrency_limit(
    upstream: ScriptedUpstream, sidecar: Sidecar
) -> None:
    release = asyncio.Event()

    async def answer(request: web.Request) -> web.StreamResponse:
        await release.wait()
        return web.json_response({"usage": {"prompt_tokens": 1, "completion_tokens": 1}})

    upstream.script = answer
    sidecar.apply(limited(max_concurrent_requests=4))
    assert await ask(sidecar, {"prompt": "x", "n": 5}, KEY) == 400, "the engine would run all five at once"
    asked = [asyncio.create_task(ask(sidecar, {"prompt": ["x"] * num, "max_tokens": 9}, KEY)) for num in (3, 3, 1)]
    await sidecar.until(lambda: len(sidecar.upstream.dispatcher.request_table.requests) == 3)
    await sidecar.until(lambda: upstream.num_open == 1)
    assert sidecar.upstream.dispatcher.request_table.num_waiting == 2, "the last is not sent past the one before it"
    release.set()
    async with asyncio.timeout(WAIT_SECONDS):
        assert await asyncio.gather(*asked) == [200] * 3
    await sidecar.settled()


async def ask(sidecar: Sidecar, fields: dict[str, Any], headers: dict[str, str] | None = None) -> int:
    async with sidecar.post(fields, "/v1/completions", headers=headers or {}) as response:
        await response.read()
        return int(response.status)


async def test_more_than_a_long_prompt_at_a_time_is_refused(upstream: ScriptedUpstream, sidecar: Sidecar) -> None:
    assert await ask(sidecar, {"prompt": "x", "n": MAX_CHOICES + 1}) == 400
    assert await ask(sidecar, {"prompt": ["x"] * (MAX_CHOICES + 1)}) == 400
    assert await ask(sidecar, {"prompt": ["x" * 300_000] * 2}) == 400  # 150,000 tokens, of a context of 131,072
    assert not upstream.received
    await sidecar.settled()


async def test_an_answer_of_any_size_is_held_in_part_alone_and_charged(
    upstream: ScriptedUpstream, sidecar: Sidecar
) -> None:
    part = b" " * 2**20

    async def answer(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "application/json"})
        await response.prepare(request)
        for number in range(24):
            await response.write(part)
            if number == 12:
                await asyncio.wait_for(begun.wait(), WAIT_SECONDS)  # the client has some of it before the rest exists
        await response.write(b"{}")
        return response

    begun, size = asyncio.Event(), 0
    upstream.script = answer
    async with sidecar.post({"max_tokens": 900}) as response:
        async for chunk in response.content.iter_any():
            begun.set()
            size += len(chunk)
    assert size == 24 * 2**20 + 2
    await sidecar.settled()
    assert sidecar.tokens()[1] == 900, "by its bytes, as it says no usage"


async def test_lines_of_json_are_no_json(upstream: ScriptedUpstream, sidecar: Sidecar) -> None:
    async def answer(request: web.Request) -> web.StreamResponse:
        return web.Response(body=b'{"a":1}\n{"a":2}\n', content_type="application/x-ndjson")

    upstream.script = answer
    async with sidecar.post({}, "/api/generate") as response:
        assert (response.status, await response.read()) == (200, b'{"a":1}\n{"a":2}\n')
    await sidecar.settled()


@pytest.mark.parametrize("is_stream", [False, True])
async def test_sglangs_own_answers_are_counted(upstream: ScriptedUpstream, sidecar: Sidecar, is_stream: bool) -> None:
    said = b'{"text":"x","meta_info":{"prompt_tokens":9,"completion_tokens":5,"cached_tokens":2}}'

    async def answer(request: web.Request) -> web.StreamResponse:
        kind = "text/event-stream" if is_stream else "application/json"
        return web.Response(body=b"data: " + said + b"\n\n" if is_stream else said, content_type=kind)

    upstream.script = answer
    async with sidecar.post({"text": "hello", "stream": is_stream}, "/generate") as response:
        assert response.status == 200
        await response.read()
    await sidecar.settled()
    assert sidecar.tokens() == (9, 5)


async def test_a_probe_that_computes_passes_no_queue(upstream: ScriptedUpstream, sidecar: Sidecar) -> None:
    async with sidecar.session.get(sidecar.url + "/health_generate") as response:
        assert response.status == 403
    assert not upstream.received


@pytest.mark.parametrize(
    ("stream", "usage", "is_hidden"),
    [("true", "no", True), (1, "false", True), (1.0, [], True), ("YES", "yes", False), (True, 1, False)],
)
async def test_a_stream_tells_its_usage_however_it_was_asked_for(
    upstream: ScriptedUpstream, sidecar: Sidecar, stream: Any, usage: Any, is_hidden: bool
) -> None:
    upstream.script = say_three
    _, text = await sidecar.stream(stream=stream, stream_options={"include_usage": usage})
    assert upstream.body()["stream_options"] == {"include_usage": True}
    assert upstream.body()["stream"] is True, "some engines take only that for true"
    assert (b"prompt_tokens" not in text) == is_hidden
    await sidecar.settled()
    assert sidecar.tokens() == (7, 3)


@pytest.mark.parametrize("background", [True, "true", 1])
async def test_nothing_is_computed_in_the_background(
    upstream: ScriptedUpstream, sidecar: Sidecar, background: Any
) -> None:
    """It would be answered at once, and cost nothing."""
    fields = {"input": "x", "background": background, "store": True}
    async with sidecar.post(fields, "/v1/responses") as response:
        assert (response.status, (await response.json())["error"]["code"]) == (400, "unsupported")
    assert not upstream.received
    await sidecar.settled()


async def test_a_background_that_is_none_passes(upstream: ScriptedUpstream, sidecar: Sidecar) -> None:
    upstream.script = say_three
    for background in (False, None, "transparent"):
        async with sidecar.post({"stream": True, "background": background}) as response:
            assert response.status == 200
            await response.read()
    await sidecar.settled()
