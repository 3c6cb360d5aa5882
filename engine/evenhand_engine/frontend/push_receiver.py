"""The engine's half of the push: `PUT /v1/scheduler-config` and `GET /v1/scheduler-config/report` on the admin port.

Owns the config in force as far as it was pushed or stored, and decides whether another one takes its place. A document
of a lower `(epoch, revision)` never does, so that a leader that was replaced, a late or a repeated request do no harm.
"""

import asyncio
import ipaddress
import logging
import secrets
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec
from aiohttp import web

from evenhand_engine.frontend.config_store import (
    LastGoodFile,
    PushKeyFolder,
    StoredConfig,
    built_in_config,
    read_bootstrap,
)
from evenhand_policy.config import PoolReference, SchedulerConfig
from evenhand_policy.push_document import DocumentRejectedError, read_document
from evenhand_policy.push_protocol import (
    CONFIG_PATH,
    MAX_DOCUMENT_BYTES,
    NONCE_HEADER,
    REPORT_PATH,
    SIGNATURE_HEADER,
    ConfigSource,
    EngineReport,
    RequestVerifier,
    SignedRequest,
    UnverifiedError,
    body_digest,
    sign_answer,
)

log = logging.getLogger(__name__)

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
Apply = Callable[[StoredConfig], None]
"""Enforce a config from now on. Raises DocumentRejectedError, and then changes nothing."""

_MAX_PROBLEM_CHARACTERS = 1000
_MAX_PATH_CHARACTERS = 256


@dataclass(frozen=True, slots=True)
class PushSettings:
    """What a pod must know to be pushed to.

    Attributes:
        pool: the EnginePool that the pod belongs to; documents of another one are refused.
        push_keys: folder where the pool's push key Secret is mounted.
        bootstrap: folder where the pool's bootstrap Secrets are mounted; None: there are none.
        last_good: file that outlives the container; None: nothing is kept.
    """

    pool: PoolReference
    push_keys: Path
    bootstrap: Path | None = None
    last_good: Path | None = None


class _Refused(Exception):
    """The request is answered with `status` and what is wrong, and nothing changes."""

    def __init__(self, status: int, message: str, path: str = "") -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.path = path


class PushReceiver:
    """Receives documents and hands them to `apply`; calls it once at start with what is stored.

    Attributes:
        boot_id: identity of this process.
        in_force: the config in force, and where it came from.
        since: Unix time at which it was put in force.
    """

    def __init__(self, settings: PushSettings, apply: Apply, *, clock: Callable[[], float] = time.time) -> None:
        self.boot_id = secrets.token_hex(16)
        self._settings = settings
        self._apply = apply
        self._clock = clock
        self._key_folder = PushKeyFolder(settings.push_keys)
        self._last_good = LastGoodFile(settings.last_good) if settings.last_good else None
        self._verifier = RequestVerifier()
        self._changing = asyncio.Lock()
        self._replicas_told_ms = 0
        self.in_force = built_in_config()
        self.since = clock()
        self._start()

    def _start(self) -> None:
        """Enforce the newest of what is stored and can be enforced."""
        for stored in sorted(self._stored(), key=lambda stored: stored.version, reverse=True):
            try:
                self._check_belonging(stored.config)
                self._apply(stored)
            except (_Refused, DocumentRejectedError) as error:
                fields = {"source": str(stored.source), "error": str(error)}
                log.warning("a stored config cannot be enforced", extra={"fields": fields})
                continue
            self.in_force = stored
            return
        self._apply(self.in_force)

    def _stored(self) -> list[StoredConfig]:
        bootstrap = self._settings.bootstrap
        found = [
            read_bootstrap(bootstrap, self._key_folder.keys()) if bootstrap else None,
            self._last_good.load() if self._last_good else None,
        ]
        return [stored for stored in found if stored is not None]

    def routes(self) -> list[web.RouteDef]:
        """To be added to the admin application."""
        return [web.put(CONFIG_PATH, self.put_config), web.get(REPORT_PATH, self.show_report, allow_head=False)]

    async def put_config(self, request: web.Request) -> web.Response:
        """Enforce the document in the body, if it is newer."""
        try:
            signed, key = self._verify(request)
        except UnverifiedError as error:
            return self._refuse_unverified(request, error)
        try:
            document = await self._read_body(request, signed)
            async with self._changing:
                await self._receive(document, signed)
        except _Refused as refused:
            fields = {"status": refused.status, "problem": refused.message, "path": refused.path}
            log.warning("a pushed config is refused", extra={"fields": fields})
            return self._answer(key, signed.nonce, refused.status, refused)
        return self._answer(key, signed.nonce, 200)

    async def show_report(self, request: web.Request) -> web.Response:
        """What is in force; to whom the request is signed or who is on this machine."""
        try:
            signed, key = self._verify(request)
        except UnverifiedError as error:
            if not is_local(request):
                return self._refuse_unverified(request, error)
            return web.Response(body=msgspec.json.encode(self._report()), content_type="application/json")
        return self._answer(key, signed.nonce, 200)

    @web.middleware
    async def require_signature(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """For what the admin application does not show to everybody: it is refused if neither signed nor local."""
        is_own = request.match_info.handler in (self.put_config, self.show_report)
        if is_own or is_local(request):
            return await handler(request)
        try:
            self._verify(request)
        except UnverifiedError as error:
            return self._refuse_unverified(request, error)
        return await handler(request)

    def _verify(self, request: web.Request) -> tuple[SignedRequest, bytes]:
        keys = self._key_folder.keys()
        return self._verifier.verify(keys, request.method, request.raw_path, request.headers, self._clock())

    async def _read_body(self, request: web.Request, signed: SignedRequest) -> bytes:
        """The body, never more of it than a document may have."""
        too_large = f"a document has {MAX_DOCUMENT_BYTES // 2**20} MiB at most"
        if (request.content_length or 0) > MAX_DOCUMENT_BYTES:
            raise _Refused(422, too_large)
        body = bytearray()
        async for chunk in request.content.iter_any():
            body += chunk
            if len(body) > MAX_DOCUMENT_BYTES:
                raise _Refused(422, too_large)
        document = bytes(body)
        if body_digest(document) != signed.digest:
            raise _Refused(401, "the body is not the one that was signed")
        return document

    async def _receive(self, document: bytes, signed: SignedRequest) -> None:
        try:
            offered = StoredConfig(read_document(document), signed.digest, signed.num_replicas, ConfigSource.PUSH)
            self._check_belonging(offered.config)
            if not self._is_due(offered, signed):
                return
            self._apply(offered)
        except DocumentRejectedError as error:
            raise _Refused(422, error.message, error.path) from None
        if offered.digest != self.in_force.digest:
            self.since = self._clock()
        self.in_force = offered
        self._replicas_told_ms = signed.time_ms
        await self._save(document, offered.num_replicas)

    def _check_belonging(self, config: SchedulerConfig) -> None:
        pool, own = config.pool, self._settings.pool
        if pool != own:
            whose = f"{pool.namespace}/{pool.name}" if pool else "no pool"
            raise _Refused(401, f"the document is of {whose}, this engine of {own.namespace}/{own.name}", "pool")
        if self.in_force.config.cluster and config.cluster != self.in_force.config.cluster:
            raise _Refused(401, "the document is of another cluster", "cluster")
        if not config.epoch or not config.revision:
            raise _Refused(422, "epoch and revision must be at least 1", "epoch")

    def _is_due(self, offered: StoredConfig, signed: SignedRequest) -> bool:
        """Whether there is anything to apply. Raises _Refused where going on would go back."""
        current = self.in_force
        if offered.version > current.version:
            return True
        if offered.version < current.version:
            raise _Refused(409, "epoch {} revision {} is in force, which is newer".format(*current.version))
        if offered.digest != current.digest:
            raise _Refused(409, "epoch {} revision {} is in force with other content".format(*current.version))
        return offered.num_replicas != current.num_replicas and signed.time_ms > self._replicas_told_ms

    async def _save(self, document: bytes, num_replicas: int) -> None:
        """A pod that cannot save still enforces: only its next start is poorer."""
        if self._last_good is None:
            return
        try:
            await asyncio.to_thread(self._last_good.save, document, num_replicas)
        except OSError as error:
            log.error("the last good config cannot be saved", extra={"fields": {"error": str(error)}})

    def _report(self, refused: _Refused | None = None) -> EngineReport:
        return EngineReport(
            boot_id=self.boot_id,
            epoch=self.in_force.config.epoch,
            revision=self.in_force.config.revision,
            digest=self.in_force.digest,
            source=self.in_force.source,
            num_replicas=self.in_force.num_replicas,
            problem=refused.message[:_MAX_PROBLEM_CHARACTERS] if refused else None,
            path=refused.path[:_MAX_PATH_CHARACTERS] if refused else "",
        )

    def _answer(self, key: bytes, nonce: str, status: int, refused: _Refused | None = None) -> web.Response:
        body = msgspec.json.encode(self._report(refused))
        headers = {SIGNATURE_HEADER: sign_answer(key, nonce, status, body)}
        return web.Response(status=status, body=body, headers=headers, content_type="application/json")

    def _refuse_unverified(self, request: web.Request, error: UnverifiedError) -> web.Response:
        """Signed where the sender has shown that it knows a key; else it learns nothing but that it is refused."""
        log.warning("a request is not believed", extra={"fields": {"from": request.remote, "problem": str(error)}})
        if error.key is None:
            return web.json_response({"problem": str(error)}, status=401)
        nonce = request.headers.get(NONCE_HEADER, "")
        return self._answer(error.key, nonce, 401, _Refused(401, str(error)))


def is_local(request: web.Request) -> bool:
    """From this machine, and by an address: a name may be a web page's, which rebinds it to reach this port."""
    host = request.url.host or ""
    return _is_loopback(request.remote or "") and (host == "localhost" or _is_loopback(host))


def _is_loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False
