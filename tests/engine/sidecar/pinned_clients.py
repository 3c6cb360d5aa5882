"""Clients of a sidecar of several processes, each of a known one, and an upstream whose answers wait for a test."""

import asyncio
import contextlib
import json
import multiprocessing
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import psutil
import pytest
from aiohttp import web

from evenhand_policy.config import SchedulerConfig, TenantConfig
from evenhand_policy.credentials import key_hash

from .conftest import DONE, WAIT_SECONDS, Sidecar, event, open_stream, usage_event


def key_of(tenant_id: str) -> str:
    return f"a-key-of-the-tenant-{tenant_id}-0123456789"


def config(**tenants: dict[str, Any]) -> SchedulerConfig:
    """Each with a key of its own."""
    return SchedulerConfig(
        tenants=tuple(
            TenantConfig(tenant_id=tenant_id, key_hashes=(key_hash(key_of(tenant_id)),), **fields)
            for tenant_id, fields in tenants.items()
        )
    )


def api_pids() -> set[int]:
    return {child.pid or 0 for child in multiprocessing.active_children() if child.name == "evenhand-api"}


@dataclass
class Gate:
    """A script that answers each request when it is told to: one chunk at once, the rest after `open`.

    Attributes:
        came: tenants by their bodies' `user`, in the order in which they came.
    """

    came: list[str] = field(default_factory=list)
    _gates: dict[str, asyncio.Event] = field(default_factory=dict)

    async def __call__(self, request: web.Request) -> web.StreamResponse:
        body = json.loads(await request.read())
        self.came.append(body["user"])
        gate = self._gates.setdefault(body["user"], asyncio.Event())
        response = await open_stream(request)
        await response.write(event())
        await gate.wait()
        await response.write(event() + usage_event(prompt=100, output=2) + DONE)
        return response

    def open(self, user: str) -> None:
        self._gates.setdefault(user, asyncio.Event()).set()


@dataclass
class Pinned:
    """A client with one connection, which it keeps, to the process `pid`."""

    url: str
    session: aiohttp.ClientSession
    pid: int

    def post(self, tenant_id: str, user: str = "", **fields: Any) -> Any:
        body = {
            "messages": [{"role": "user", "content": "hi"}],
            "stream": True,
            "max_tokens": 2,
            "user": user,
            **fields,
        }
        headers = {"Authorization": f"Bearer {key_of(tenant_id)}"}
        return self.session.post(self.url + "/v1/chat/completions", json=body, headers=headers)

    async def ask(self, tenant_id: str, user: str = "", **fields: Any) -> tuple[int, bytes]:
        async with self.post(tenant_id, user, **fields) as response:
            return response.status, await response.read()

    async def get(self, path: str) -> tuple[int, str]:
        async with self.session.get(self.url + path) as response:
            return response.status, await response.text()


async def connect_each(
    stack: contextlib.AsyncExitStack, url: str, num_clients: int, pids: Callable[[], set[int]] = api_pids
) -> list[list[Pinned]]:
    """Lists of `num_clients` each, one list for each of the processes; connected until the stack is left."""
    clients: dict[int, list[Pinned]] = {}
    for _ in range(200):
        before = ports_to(url)
        session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=1))
        await stack.enter_async_context(session)
        async with session.get(url + "/health") as response:
            await response.read()
        [port] = ports_to(url) - before
        [pid] = [pid for pid in pids() if port in remote_ports(pid)]
        clients.setdefault(pid, []).append(Pinned(url, session, pid))
        if len(clients) == len(pids()) and min(map(len, clients.values())) >= num_clients:
            return [each[:num_clients] for each in clients.values()]
    pytest.fail("the kernel gives every connection to the same process")


def ports_to(url: str) -> set[int]:
    """From which this process is connected to that port."""
    port = int(url.rpartition(":")[2])
    return {
        each.laddr.port for each in psutil.Process().net_connections("tcp") if each.raddr and each.raddr.port == port
    }


def remote_ports(pid: int) -> set[int]:
    """Of the connections that the process has."""
    return {each.raddr.port for each in psutil.Process(pid).net_connections("tcp") if each.raddr}


async def begin(sidecar: Sidecar, client: Pinned, tenant_id: str, user: str, **fields: Any) -> "asyncio.Task[Any]":
    """A request that the owner has got."""
    table = sidecar.upstream.dispatcher.request_table
    num_before = len(table.requests)
    task = asyncio.create_task(client.ask(tenant_id, user, **fields))
    await sidecar.until(lambda: len(table.requests) > num_before)
    return task


async def until_status(client: Pinned, status: int) -> None:
    async with asyncio.timeout(WAIT_SECONDS):
        while (await client.get("/ready"))[0] != status:
            await asyncio.sleep(0.01)
