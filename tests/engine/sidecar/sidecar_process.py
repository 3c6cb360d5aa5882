"""`evenhand sidecar` in processes of its own, and clients of each of those at its public port."""

import asyncio
import contextlib
import os
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
import psutil
import yaml

from cluster.ports import free_ports

from .pinned_clients import Pinned, connect_each, key_of


@dataclass
class SidecarProcess:
    """A running sidecar.

    Attributes:
        process: the one that was started.
        others: all that it has started.
    """

    process: asyncio.subprocess.Process
    url: str
    admin_url: str
    others: list[psutil.Process] = field(default_factory=list)
    _stack: contextlib.AsyncExitStack = field(default_factory=contextlib.AsyncExitStack)

    @property
    def port_pids(self) -> set[int]:
        """Of the processes at the public port."""
        api_servers = {process.pid for process in self.others if "spawn_main" in " ".join(process.cmdline())}
        return api_servers or {self.process.pid}

    async def connect(self, num_clients: int) -> list[list[Pinned]]:
        """Lists of `num_clients`, one list for each process at the public port."""
        pids = self.port_pids
        return await connect_each(self._stack, self.url, num_clients, lambda: pids)

    async def until_queued(self, count: int) -> None:
        """Until so many requests wait for their turn."""
        async with aiohttp.ClientSession() as session:
            while f"evenhand_sidecar_queued_requests {count}.0" not in await _get(session, f"{self.admin_url}/metrics"):
                await asyncio.sleep(0.01)

    async def all_have_ended(self) -> None:
        """Until none of its processes is left."""
        while any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in self.others):
            await asyncio.sleep(0.01)


@contextlib.asynccontextmanager
async def sidecar_process(
    upstream_url: str, policies: Path, *flags: str, ports: list[int] | None = None
) -> AsyncIterator[SidecarProcess]:
    """One that is ready, at these ports."""
    port, admin_port = ports or free_ports(2)
    command = [str(Path(sys.executable).with_name("evenhand")), "sidecar", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--admin-port", str(admin_port), "--upstream", upstream_url, "--policies", str(policies), *flags]
    process = await asyncio.create_subprocess_exec(
        *command, stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.DEVNULL
    )
    sidecar = SidecarProcess(process, f"http://127.0.0.1:{port}", f"http://127.0.0.1:{admin_port}")
    try:
        async with sidecar._stack, aiohttp.ClientSession() as session:
            while not await _is_ready(session, sidecar):
                assert process.returncode is None, "it does not start"
                await asyncio.sleep(0.05)
            sidecar.others = psutil.Process(process.pid).children(recursive=True)
            yield sidecar
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        for other in sidecar.others:
            with contextlib.suppress(psutil.NoSuchProcess):
                other.kill()
        await process.wait()


async def _is_ready(session: aiohttp.ClientSession, sidecar: SidecarProcess) -> bool:
    with contextlib.suppress(aiohttp.ClientError):
        async with session.get(f"{sidecar.admin_url}/ready") as response:
            return response.status == 200
    return False


async def _get(session: aiohttp.ClientSession, url: str) -> str:
    async with session.get(url) as response:
        return await response.text()


def write_policy(directory: Path, tenant_id: str, **spec: object) -> None:
    """Of a tenant with a key of its own."""
    secret = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": f"{tenant_id}-keys"}}
    identity = {"name": "keys", "type": "APIKey", "apiKey": {"secretRef": {"name": f"{tenant_id}-keys"}}}
    policy = {
        "apiVersion": "evenhand.dev/v1alpha1",
        "kind": "TenantPolicy",
        "metadata": {"name": tenant_id},
        "spec": {"identities": [identity], **spec},
    }
    documents = [secret | {"stringData": {"key": key_of(tenant_id)}}, policy]
    (directory / ".new").write_text(yaml.safe_dump_all(documents))
    os.replace(directory / ".new", directory / f"{tenant_id}.yaml")
