"""Policies on disk, and what the server tells of their tenants."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import yaml
from prometheus_client.parser import text_string_to_metric_families

from evenhand_engine.messages import (
    AddRequest,
)
from evenhand_engine.scheduler.request import FinishReason, RequestOutput

from .conftest import Server
from .scripted_core import WAIT_SECONDS

CHAT_KEY, BATCH_KEY = "chat-key-0123456789-0123456789", "batch-key-0123456789-0123456789"


def policy(tenant: str, key: str | None = None, **spec: Any) -> list[dict[str, Any]]:
    identities: dict[str, Any] = {}
    documents: list[dict[str, Any]] = []
    if key is not None:
        secret = {"secretRef": {"name": f"{tenant}-key"}}
        identities = {"identities": [{"name": "key", "type": "APIKey", "apiKey": secret}]}
        documents = [
            {
                "apiVersion": "v1",
                "kind": "Secret",
                "metadata": {"name": f"{tenant}-key", "namespace": "default"},
                "stringData": {"key": key},
            }
        ]
    metadata = {"name": tenant, "namespace": "default"}
    body = {"apiVersion": "evenhand.dev/v1alpha1", "kind": "TenantPolicy", "metadata": metadata}
    return [*documents, body | {"spec": identities | spec}]


def write(directory: Path, name: str, documents: list[dict[str, Any]]) -> None:
    """Atomically, as editors and kubelets do."""
    hidden = directory / f".{name}.tmp"
    hidden.write_text(yaml.safe_dump_all(documents))
    hidden.rename(directory / f"{name}.yaml")


def write_two(directory: Path) -> Path:
    """The policies of two tenants, in a directory of their own."""
    policies = directory / "policies"
    policies.mkdir()
    write(policies, "chat", policy("chat", CHAT_KEY, weight=4))
    write(policies, "batch", policy("batch", BATCH_KEY, latencyClass="Batch"))
    return policies


def admin(server: Server, path: str) -> Any:
    return httpx2.get(server.admin_url + path, timeout=WAIT_SECONDS).raise_for_status().json()


def tenant(server: Server, tenant_id: str) -> dict[str, Any]:
    (found,) = [t for t in admin(server, "/v1/tenants")["tenants"] if t["tenantId"] == tenant_id]
    return dict(found)


def samples(server: Server, path: str = "/metrics", *, public: bool = False) -> dict[str, float]:
    """Metrics as `name{label=value,...}` without the constant labels."""
    text = httpx2.get((server.url if public else server.admin_url) + path, timeout=WAIT_SECONDS).text
    constant = {"model_name", "engine"}
    return {
        f"{s.name}{{{','.join(f'{k}={v}' for k, v in sorted(s.labels.items()) if k not in constant)}}}": s.value
        for family in text_string_to_metric_families(text)
        for s in family.samples
    }


def until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"not in {WAIT_SECONDS} s: {what}"
        time.sleep(0.01)


def until_count(server: Server, name: str, value: float) -> None:
    until(lambda: samples(server).get(name) == value, f"{name} is {value}")


def complete(server: Server, key: str, **options: Any) -> Any:
    return server.client(api_key=key).completions.with_raw_response.create(
        **{"model": "tiny", "prompt": "x", "max_tokens": 5} | options
    )


@contextlib.contextmanager
def pending(server: Server, key: str, count: int) -> Iterator[list[AddRequest]]:
    """Requests that the core has received and not answered; they are ended on leaving."""
    threads = [threading.Thread(target=complete, args=(server, key)) for _ in range(count)]
    for thread in threads:
        thread.start()
    requests = [server.core.expect(AddRequest) for _ in threads]
    try:
        yield requests
    finally:
        for request in requests:
            server.core.output(
                RequestOutput(request_id=request.request_id, token_ids=(5,), finish_reason=FinishReason.STOP)
            )
        for thread in threads:
            thread.join(WAIT_SECONDS)
