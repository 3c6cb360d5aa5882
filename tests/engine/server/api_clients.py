"""Clients of a server of several processes, and the policy of their tenant."""

import json
import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import yaml
from prometheus_client.parser import text_string_to_metric_families

from evenhand_engine.messages import AddRequest

from .conftest import Server, connect
from .scripted_core import WAIT_SECONDS

KEY = "key-of-the-tenant-that-is-limited"
HEADERS = {"Authorization": f"Bearer {KEY}"}


def write_policy(directory: Path, key: str = KEY, **limits: object) -> None:
    secret = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "keys"}, "stringData": {"key": key}}
    identity = {"name": "keys", "type": "APIKey", "apiKey": {"secretRef": {"name": "keys"}}}
    policy = {
        "apiVersion": "evenhand.dev/v1alpha1",
        "kind": "TenantPolicy",
        "metadata": {"name": "chat"},
        "spec": {"identities": [identity], "limits": limits},
    }
    (directory / ".new").write_text(yaml.safe_dump_all([secret, policy]))
    os.replace(directory / ".new", directory / "chat.yaml")


def ask(server: Server, **body: object) -> httpx2.Response:
    """By a connection of its own, which the kernel gives to one of the processes."""
    with httpx2.Client(base_url=server.url, headers=HEADERS, timeout=WAIT_SECONDS) as client:
        return complete(client, **body)


def complete(client: httpx2.Client, **body: object) -> httpx2.Response:
    return client.post("/v1/completions", json={"prompt": "x", "max_tokens": 5} | body)


Pinned = Callable[[Server], list[httpx2.Client]]


def tenant(server: Server, tenant_id: str = "chat") -> dict[str, Any]:
    tenants = httpx2.get(f"{server.admin_url}/v1/tenants").json()["tenants"]
    return next(dict(found) for found in tenants if found["tenantId"] == tenant_id)


def metric(asked: str | httpx2.Client, name: str) -> float:
    """Its sum over all labels."""
    answer = httpx2.get(f"{asked}/metrics") if isinstance(asked, str) else asked.get("/metrics")
    families = text_string_to_metric_families(answer.text)
    return sum(sample.value for family in families for sample in family.samples if sample.name == name)


def spoken(response: httpx2.Response) -> str:
    return str(response.json()["error"]["code"] if response.status_code != 200 else "ok")


class Stream:
    """A client that reads a stream, on a connection of its own.

    Attributes:
        request_id: of the request in the core.
    """

    def __init__(self, server: Server) -> None:
        self._connection = connect(server)
        body = json.dumps({"prompt": "x", "max_tokens": 100, "stream": True}).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\nContent-Length: {len(body)}"
        self._connection.sendall(head.encode() + b"\r\n\r\n" + body)
        self.request_id = server.core.expect(AddRequest).request_id
        self.origin = server.core.origins[self.request_id]

    def read_until(self, what: bytes) -> bool:
        """Whether it comes before the end."""
        seen = b""
        while what not in seen:
            try:
                part = self._connection.recv(65536)
            except ConnectionResetError:
                part = b""
            if not part:
                return False
            seen += part
        return True

    def close(self) -> None:
        self._connection.close()


def api_pids() -> set[int]:
    return {child.pid or 0 for child in multiprocessing.active_children() if child.name == "evenhand-api"}
