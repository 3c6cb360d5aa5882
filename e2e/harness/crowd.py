"""Many ready engine pods in few processes: the engine's real admin code for each, and a log of when it enforced what.

They are Pod objects without a Deployment, whose status is written once: what counts is how the operator serves them.
"""

import argparse
import asyncio
import base64
import gc
import itertools
import json
import sys
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

from aiohttp import web
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from cluster.api_client import ApiClient
from cluster.container import now
from cluster.control_plane import ControlPlane
from cluster.pod_runner import NODE, condition, loopback_addresses, request_token
from cluster.programs import Program
from evenhand_engine.frontend.config_in_force import Enforce
from evenhand_engine.frontend.config_store import ConfigDocument
from evenhand_engine.frontend.push_receiver import PushSettings
from evenhand_operator.signing_key import SECRET_NAME, SECRET_TYPE, key_data
from evenhand_policy.bootstrap import KEYS_FILE
from evenhand_policy.config import PoolReference
from evenhand_policy.push_protocol import POD_TOKEN_AUDIENCE
from evenhand_policy.signatures import write_key_set
from harness.light_engine import build_app
from harness.objects import ADMIN_PORT, ENGINE_LABELS

Object = dict[str, Any]

_LOOK_SECONDS = 0.01


class Crowd:
    """`num_pods` pods of the pool `default`, served by `num_processes` processes while it is entered, and the engines of
    `num_spares` more, which may take the place of others."""

    def __init__(
        self,
        cluster: ControlPlane,
        namespace: str,
        num_pods: int,
        num_processes: int,
        folder: Path,
        num_spares: int = 0,
    ) -> None:
        self._folder = folder
        self._cluster = cluster
        (folder / "bootstrap").mkdir(parents=True)
        self._install_key()
        addresses = list(itertools.islice(loopback_addresses(), num_pods + num_spares))
        self.addresses, self._spares = addresses[:num_pods], addresses[num_pods:]
        self._path = f"/api/v1/namespaces/{namespace}/pods"
        self._programs: list[Program] = []
        for index in range(num_processes):
            command = [sys.executable, "-m", "harness.crowd", f"--namespace={namespace}", f"--folder={folder}"]
            log = folder / f"crowd-{index}.log"
            own = addresses[index::num_processes]
            self._programs.append(cluster.program(log.stem, [*command, *own], log))
        self._offsets = [0] * num_processes
        self._enforced_at: dict[str, dict[int | None, dict[str, float]]] = defaultdict(lambda: defaultdict(dict))

    def __enter__(self) -> Self:
        for program in self._programs:
            program.start()
        for program in self._programs:
            program.wait_until_ready(lambda log=program.log: "serving" in log.read_text())  # type: ignore[misc]
        return self

    def __exit__(self, *_: object) -> None:
        for program in self._programs:
            program.stop(grace=0)

    def _install_key(self) -> None:
        """The operator's key is there before it, so that pods know it from the beginning."""
        current, upcoming = Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()
        (self._folder / "bootstrap" / KEYS_FILE).write_bytes(
            write_key_set([current.public_key(), upcoming.public_key()])
        )
        data = {name: base64.b64encode(value).decode() for name, value in key_data(current, upcoming).items()}
        since = {"evenhand.dev/current-since": now()}
        metadata = {"name": SECRET_NAME, "namespace": "evenhand-system", "annotations": since}
        self._cluster.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "evenhand-system"}})
        self._cluster.apply(
            {"apiVersion": "v1", "kind": "Secret", "metadata": metadata, "type": SECRET_TYPE, "data": data}
        )

    @property
    def pids(self) -> list[int]:
        """Of the processes that serve the pods."""
        return [program.pid for program in self._programs]

    async def join(self, client: ApiClient) -> None:
        """Make the Pods known to the API server, ready as they are, and give each the token that proves it."""
        for address in self.addresses:
            await self._join(client, address)

    async def _join(self, client: ApiClient, address: str) -> None:
        name = _name(address)
        pod = await client.call("POST", self._path, _pod(name))
        folder = self._folder / address
        folder.mkdir(exist_ok=True)
        (folder / "token").write_text(await request_token(client, pod, POD_TOKEN_AUDIENCE))
        body = {"status": _status(address)}
        await client.call("PATCH", f"{self._path}/{name}/status", body, "application/merge-patch+json")

    async def replace_first(self, client: ApiClient) -> None:
        """One pod more, whose engine has nothing stored, and the pod that is there for longest less: as a Deployment rolls."""
        address = self._spares.pop()
        await self._join(client, address)
        await client.call("DELETE", f"{self._path}/{_name(self.addresses[0])}", {"gracePeriodSeconds": 0})
        self.addresses = [*self.addresses[1:], address]

    async def enforced_at(self, tenant: str, generation: int | None, timeout: float = 30) -> list[float]:
        """When each pod, by `time.monotonic()`, began to enforce that generation of the tenant (None: that it is gone).

        Raises TimeoutError where not all of them do in time.
        """
        async with asyncio.timeout(timeout):
            while not (times := self._enforced_at[tenant][generation]).keys() >= set(self.addresses):
                await asyncio.sleep(_LOOK_SECONDS)
                self._read_logs()
        return [times[address] for address in self.addresses]

    def _read_logs(self) -> None:
        for index, program in enumerate(self._programs):
            with program.log.open("rb") as log:
                log.seek(self._offsets[index])
                lines = log.read().rpartition(b"\n")[0]
            self._offsets[index] += len(lines) + bool(lines)
            for line in lines.splitlines():
                if line.startswith(b"{"):
                    change = json.loads(line)
                    for tenant, generation in change["tenants"].items():
                        self._enforced_at[tenant][generation][change["address"]] = change["at"]


def _name(address: str) -> str:
    return f"engine-{address.replace('.', '-')}"


def _pod(name: str) -> Object:
    port = {"name": "admin", "containerPort": ADMIN_PORT}
    spec = {"nodeName": NODE, "containers": [{"name": "engine", "image": "light-engine", "ports": [port]}]}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "labels": ENGINE_LABELS | {"evenhand.dev/pool": "default"}},
        "spec": spec,
    }


def _status(address: str) -> Object:
    started_at = now()
    container = {
        "name": "engine",
        "image": "light-engine",
        "imageID": "light-engine",
        "ready": True,
        "restartCount": 0,
        "state": {"running": {"startedAt": started_at}},
    }
    return {
        "phase": "Running",
        "startTime": started_at,
        "podIP": address,
        "podIPs": [{"ip": address}],
        "conditions": [condition("Ready", True, started_at)],
        "containerStatuses": [container],
    }


class _Changes:
    """What has changed from one document to another, by tenant: its generation, None where it is gone.

    It is worked out once for all pods: one that only looks on is not to take their time.
    """

    def __init__(self) -> None:
        self._generations: dict[str, dict[str, int | None]] = {"": {}}
        self._found: dict[tuple[str, str], str] = {}

    def between(self, before: str, offered: ConfigDocument) -> str:
        """As JSON; `before` is the digest of the one that was in force, empty where there was none."""
        digest = offered.assignment.digest
        if (before, digest) not in self._found:
            self._found[before, digest] = json.dumps(self._work_out(before, digest, offered))
        return self._found[before, digest]

    def _work_out(self, before: str, digest: str, offered: ConfigDocument) -> dict[str, int | None]:
        earlier = self._generations[before]
        after: dict[str, int | None] = {tenant.tenant_id: tenant.generation for tenant in offered.config.tenants}
        self._generations[digest] = after
        changed: dict[str, int | None] = dict.fromkeys(earlier.keys() - after.keys())
        return changed | {tenant: number for tenant, number in after.items() if earlier.get(tenant) != number}


def _log_changes(address: str, changes: _Changes) -> Enforce:
    """Enforces nothing, and writes when it was told to, and what has changed."""
    before = ""

    def enforce(offered: ConfigDocument) -> None:
        nonlocal before
        at = time.monotonic()
        sys.stdout.write(f'{{"address": "{address}", "at": {at}, "tenants": {changes.between(before, offered)}}}\n')
        sys.stdout.flush()
        before = offered.assignment.digest

    return enforce


async def _serve(namespace: str, folder: Path, addresses: list[str]) -> None:
    pool = PoolReference(namespace=namespace, name="default")
    changes = _Changes()
    # each pod has threads of its own: what one is to read does not wait for what another saves
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(2 * len(addresses)))
    for address in addresses:
        own = folder / address
        settings = PushSettings(pool, folder / "bootstrap", own / "token", own / "last-good.json")
        runner = web.AppRunner(build_app(settings, _log_changes(address, changes)), access_log=None)
        await runner.setup()
        await web.TCPSite(runner, address, ADMIN_PORT).start()
    gc.freeze()  # as an engine does
    sys.stdout.write("serving\n")
    sys.stdout.flush()
    await asyncio.Event().wait()


def main() -> None:
    """Serve the admin ports of some pods, until killed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--namespace", required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("addresses", nargs="+")
    options = parser.parse_args()
    asyncio.run(_serve(options.namespace, options.folder, options.addresses))


if __name__ == "__main__":
    main()
