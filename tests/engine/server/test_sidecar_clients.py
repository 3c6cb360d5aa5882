"""The official client through a sidecar, before our own server: it cannot tell the two apart."""

import asyncio
from collections.abc import AsyncIterator

import openai
import pytest

from evenhand_engine.backends.upstream_connection import UpstreamSettings
from evenhand_engine.frontend.settings import ServerSettings
from evenhand_engine.scheduler.request import RequestOutput
from evenhand_engine.server.sidecar_startup import start_sidecar
from evenhand_engine.sidecar.service import SidecarService

from .conftest import Say, Serve, Server
from .scripted_core import WAIT_SECONDS

TEXT = "abcabc"


@pytest.fixture
def engine(serve: Serve, say: Say) -> Server:
    return serve(say(TEXT))


@pytest.fixture
async def sidecar(engine: Server) -> AsyncIterator[tuple[openai.AsyncOpenAI, SidecarService]]:
    settings = ServerSettings(host="127.0.0.1", port=0, admin_port=0)
    async with start_sidecar(settings, UpstreamSettings(url=engine.url)) as running:
        assert isinstance(running.service, SidecarService)
        async with openai.AsyncOpenAI(
            base_url=f"{running.url}/v1", api_key="none", max_retries=0, timeout=WAIT_SECONDS
        ) as client:
            yield client, running.service


async def test_chats_and_completions_are_the_engines_own(
    sidecar: tuple[openai.AsyncOpenAI, SidecarService], engine: Server
) -> None:
    client, service = sidecar
    (model,) = (await client.models.list()).data
    chat = await client.chat.completions.create(model=model.id, messages=[{"role": "user", "content": "hello"}])
    assert chat.choices[0].message.content == TEXT and chat.usage is not None
    stream = await client.chat.completions.create(
        model=model.id, messages=[{"role": "user", "content": "hello"}], stream=True
    )
    chunks = [chunk async for chunk in stream]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == TEXT
    assert all(chunk.choices for chunk in chunks)  # the usage was asked for here, and is hidden
    completion = await client.completions.create(model=model.id, prompt="hello", max_tokens=3)
    assert completion.choices[0].finish_reason == "length" and completion.usage is not None
    tenant = service.upstream.dispatcher.request_table.tenants["default"]
    assert tenant.num_generation_tokens == 2 * chat.usage.completion_tokens + completion.usage.completion_tokens
    assert service.upstream.dispatcher.window.num_in_flight == 0


async def test_errors_of_the_engine_are_the_clients(sidecar: tuple[openai.AsyncOpenAI, SidecarService]) -> None:
    client, _ = sidecar
    with pytest.raises(openai.NotFoundError, match="not served here"):
        await client.completions.create(model="another", prompt="hello")
    with pytest.raises(openai.BadRequestError) as refused:
        await client.completions.create(model="tiny", prompt="hello", temperature=-1)
    assert refused.value.param == "temperature"


async def test_the_engines_death_ends_a_stream_with_a_reason(
    serve: Serve, sidecar: tuple[openai.AsyncOpenAI, SidecarService], engine: Server
) -> None:
    client, service = sidecar
    engine.core.reply = lambda request: [
        RequestOutput(request_id=request.request_id),
        RequestOutput(request_id=request.request_id, token_ids=(65,)),
    ]
    stream = await client.completions.create(model="tiny", prompt="hello", stream=True)
    engine.core.die()
    with pytest.raises(openai.APIError):
        async for _ in stream:
            pass
    async with asyncio.timeout(WAIT_SECONDS):
        while service.upstream.dispatcher.window.num_in_flight:
            await asyncio.sleep(0.01)
