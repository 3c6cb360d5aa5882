"""The admin application, on a port that tenants must not reach: what is enforced, and each tenant's live in_force.

Health and metrics are for anybody who reaches the port; the rest is for this machine and for who knows the push key,
since it names tenants.
"""

import asyncio
import contextlib
import math
import time
from typing import Any

import msgspec
from aiohttp import web
from aiohttp.typedefs import Middleware

from evenhand_engine.errors import Refusal
from evenhand_engine.frontend.account import TenantAccount
from evenhand_engine.frontend.door import DOOR, OwnDoor
from evenhand_engine.frontend.local_request import is_local
from evenhand_engine.frontend.push_receiver import PushReceiver
from evenhand_engine.frontend.quota import TokenBucket
from evenhand_engine.frontend.service import SERVICE, Service
from evenhand_engine.frontend.share_tracker import Share
from evenhand_engine.messages import TenantStats
from evenhand_engine.openai.responses import json_response, metrics_response
from evenhand_engine.server.app import PROBES, answer_errors, is_probe, log_access
from evenhand_engine.server.information import show_health, show_ready
from evenhand_engine.server.routes import Handler

_DRAIN_POLL_SECONDS = 0.1


def build_admin_app(
    service: Service, receiver: PushReceiver | None = None, *, tells_of_drains: bool = False
) -> web.Application:
    """The application.

    Args:
        receiver: takes the operator's pushes; what it finds signed is answered like what comes from this machine.
        tells_of_drains: answer /drained, for an engine that this server stands before.
    """
    guard = require_loopback if receiver is None else _require_signature(receiver)
    app = web.Application(middlewares=[log_access, answer_errors, guard])
    app[SERVICE] = service
    app[DOOR] = OwnDoor(service)
    app[PROBES] = frozenset({show_health, show_ready, show_metrics, wait_until_drained})
    if receiver is not None:
        app.add_routes(receiver.routes())
    app.add_routes(
        [
            web.get("/v1/scheduler-config", show_config),
            web.get("/v1/tenants", list_tenants),
            web.get("/metrics", show_metrics),
            web.get("/health", show_health),
            web.get("/ready", show_ready),
        ]
    )
    if tells_of_drains:
        app.router.add_get("/drained", wait_until_drained)
    return app


@web.middleware
async def require_loopback(request: web.Request, handler: Handler) -> web.StreamResponse:
    if not is_probe(request) and not is_local(request):
        raise Refusal(403, "not_local", "This is answered to requests from the machine itself only.")
    return await handler(request)


def _require_signature(receiver: PushReceiver) -> Middleware:
    @web.middleware
    async def require_signature(request: web.Request, handler: Handler) -> web.StreamResponse:
        if is_probe(request):
            return await handler(request)
        return await receiver.require_signature(request, handler)

    return require_signature


async def show_config(request: web.Request) -> web.Response:
    """The config in force, where it came from, and why a newer one is not. It holds hashes of keys, never keys."""
    service = request.app[SERVICE]
    in_force = service.in_force
    version = None if service.settings.push is None else in_force.assignment.version
    stats = service.backend.stats
    return json_response(
        {
            "backend": service.backend_name,
            "source": in_force.source,
            "path": None if service.settings.policies is None else str(service.settings.policies),
            "digest": in_force.digest,
            "epoch": version.epoch if version else None,
            "revision": version.revision if version else None,
            "numReplicas": in_force.num_replicas,
            "appliedAt": in_force.applied_at,
            "engineDigest": None if stats is None else stats.config_digest,
            "error": in_force.error,
            "rejectedAt": in_force.rejected_at,
            "config": msgspec.to_builtins(in_force.config),
        }
    )


async def list_tenants(request: web.Request) -> web.Response:
    service = request.app[SERVICE]
    shares, now = service.shares.shares(), time.monotonic()
    accounts = service.admission.accounts
    return json_response(
        {
            "tenants": [
                _tenant(service, tenant_id, account, shares.get(tenant_id), now)
                for tenant_id, account in sorted(accounts.items())
            ]
        }
    )


def _tenant(
    service: Service, tenant_id: str, account: TenantAccount, share: Share | None, now: float
) -> dict[str, Any]:
    config, stats = account.config, service.tenants.get(tenant_id)
    return {
        "tenantId": tenant_id,
        "weight": config.weight,
        "latencyClass": config.latency_class,
        "enforcement": config.enforcement,
        "suspended": config.suspended,
        "inFlight": account.num_in_flight,
        "bodyBytes": service.bodies.num_bytes(tenant_id),
        **(_work(stats) if stats is not None else {}),
        "attainedShare": None if share is None else round(share.attained, 4),
        "entitledShare": None if share is None else round(share.entitled, 4),
        "quota": {"requests": _quota(account.requests, now), "tokens": _quota(account.tokens, now)},
        "refusals": account.refusals,
        "audited": account.audited,
    }


def _work(stats: TenantStats) -> dict[str, Any]:
    return {
        "running": stats.num_running,
        "waiting": stats.num_waiting,
        "kvBlocks": stats.num_kv_blocks,
        "service": stats.service,
        "virtualService": stats.virtual_service,
        "ahead": stats.ahead,
        "lag": stats.lag,
        "lagBound": stats.lag_bound,
        "preemptions": stats.num_preemptions,
        "promptTokens": stats.num_prompt_tokens,
        "generationTokens": stats.num_generation_tokens,
    }


def _quota(bucket: TokenBucket | None, now: float) -> dict[str, Any] | None:
    if bucket is None:
        return None
    return {
        "limitPerMinute": bucket.limit,
        "remaining": max(0, math.floor(bucket.level(now))),
        "secondsUntilFull": round(bucket.seconds_until_full(now), 1),
    }


async def show_metrics(request: web.Request) -> web.Response:
    return metrics_response(request.app[SERVICE].metrics.admin_text())


async def wait_until_drained(request: web.Request) -> web.Response:
    """Answers when a drain has ended, within --drain-timeout; soon where none begins: whoever asks may be alone to end.

    It begins none, so that anybody who reaches the port may ask, such as the preStop hook of a container that must outlive
    what runs here.
    """
    service = request.app[SERVICE]
    until = time.monotonic() + service.settings.drain_notice
    while not service.draining and time.monotonic() < until:
        await asyncio.sleep(_DRAIN_POLL_SECONDS)
    if service.draining:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(service.settings.drain_timeout):
                await service.wait_until_idle()
    return web.Response()
