"""The engine's half of the push, on the admin port: what is in force, and what may take its place.

Owns the config in force as far as it was pushed or stored. `evenhand_policy.version.judge` decides; a lower version never
takes the place of a higher one, so that a leader that was replaced, a late or a repeated request do no harm.
"""

import asyncio
import ipaddress
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
from aiohttp import web
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from evenhand_engine.frontend.config_store import BootstrapFolder, LastGoodFile, StoredConfig, built_in_config
from evenhand_engine.frontend.pod_identity import PodIdentity
from evenhand_engine.frontend.request_verifier import RequestVerifier, UnverifiedError
from evenhand_policy.config import PoolReference, SchedulerConfig
from evenhand_policy.push_document import (
    MAX_DOCUMENT_BYTES,
    DocumentRejectedError,
    decompress,
    read_document,
    understood_members,
)
from evenhand_policy.push_protocol import (
    CONFIG_PATH,
    POD_TOKEN_HEADER,
    REPORT_PATH,
    SIGNATURE_HEADER,
    ConfigSource,
    EngineReport,
    Request,
    sign_answer,
)
from evenhand_policy.signatures import public_text
from evenhand_policy.version import Verdict, judge

log = logging.getLogger(__name__)

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
Apply = Callable[[StoredConfig], None]
"""Enforce a config from now on. Raises DocumentRejectedError, and then changes nothing."""

_MAX_PROBLEM_CHARACTERS = 1000
_MAX_PATH_CHARACTERS = 256
_LOOK_SECONDS = 0.05
_OWN_ADDRESSES = frozenset({"127.0.0.1", "::1", "::ffff:127.0.0.1"})
_FORWARDED = frozenset({"forwarded", "via", "x-forwarded-for", "x-forwarded-client-cert", "x-envoy-external-address"})


@dataclass(frozen=True, slots=True)
class PushSettings:
    """What a pod must know to be pushed to.

    Attributes:
        pool: the EnginePool that the pod belongs to; documents of another one are refused.
        bootstrap: folder where the pool's bootstrap Secrets are mounted: the operator's keys, and the stored document.
        pod_token: file of the projected token that proves which pod this is; None: it cannot be proved.
        last_good: file that outlives the container; None: nothing is kept.
    """

    pool: PoolReference
    bootstrap: Path
    pod_token: Path | None = None
    last_good: Path | None = None


class _Refused(Exception):
    """The request is answered with `status` and what is wrong, and nothing changes."""

    def __init__(self, status: int, message: str, path: str = "") -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.path = path


class PushReceiver:
    """Receives documents and hands them to `apply`; calls it once at start with what is stored, if anything is.

    Args:
        ailment: what is wrong with the engine, such as that its core does not enforce yet what was applied; None: nothing.

    Attributes:
        boot_id: identity of this process: the public half of a key that only it has.
        in_force: the config in force, and where it came from.
        since: Unix time at which it was put in force.
    """

    def __init__(
        self,
        settings: PushSettings,
        apply: Apply,
        *,
        ailment: Callable[[], str | None] = lambda: None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._settings = settings
        self._apply = apply
        self._ailment = ailment
        self._clock = clock
        self._key = Ed25519PrivateKey.generate()
        self.boot_id = public_text(self._key)
        self._bootstrap = BootstrapFolder(settings.bootstrap)
        self._identity = PodIdentity(settings.pod_token)
        self._last_good = LastGoodFile(settings.last_good) if settings.last_good else None
        self._keeping: asyncio.Task[None] | None = None
        self._verifier = RequestVerifier()
        self._changing = asyncio.Lock()
        self.in_force = built_in_config()
        self.since = clock()
        self._start()

    def _start(self) -> None:
        """Enforce the newest of what is stored and can be enforced."""
        found = [self._bootstrap.read(), self._last_good.load() if self._last_good else None]
        stored_ones = [stored for stored in found if stored is not None]
        for stored in sorted(stored_ones, key=lambda stored: stored.assignment.version, reverse=True):
            try:
                self._check_belonging(stored.config.cluster, stored.config.pool)
                self._apply(stored)
            except (_Refused, DocumentRejectedError) as error:
                fields = {"source": str(stored.source), "error": str(error)}
                log.warning("a stored config cannot be enforced", extra={"fields": fields})
                continue
            self.in_force = stored
            return

    def routes(self) -> list[web.RouteDef]:
        """To be added to the admin application."""
        return [
            web.put(CONFIG_PATH, self.put_config),
            web.patch(CONFIG_PATH, self.put_config),
            web.get(REPORT_PATH, self.show_report, allow_head=False),
        ]

    async def put_config(self, request: web.Request) -> web.Response:
        """Enforce the document in the body, or in force already, if that is newer."""
        try:
            asked = self._verify(request)
        except UnverifiedError as error:
            return self._refuse_unverified(request, error)
        try:
            self._check_belonging(asked.cluster, asked.pool)
            body = await self._read_body(request)
            async with self._changing:
                await self._receive(asked, body)
        except _Refused as refused:
            fields = {"status": refused.status, "problem": refused.message, "path": refused.path}
            log.warning("a pushed config is refused", extra={"fields": fields})
            return self._answer(asked, refused.status, self._report(refused))
        return self._answer(asked, 200, self._report())

    async def show_report(self, request: web.Request) -> web.Response:
        """What is in force; to the operator, whom it is proved to, or who is on this machine."""
        try:
            asked = self._verify(request)
        except UnverifiedError as error:
            if "Authorization" in request.headers or not is_local(request):
                return self._refuse_unverified(request, error)
            return web.Response(body=msgspec.json.encode(self._report()), content_type="application/json")
        report = msgspec.structs.replace(self._report(), understands=tuple(sorted(understood_members())))
        return self._answer(asked, 200, report, {POD_TOKEN_HEADER: self._identity.token()})

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

    def _verify(self, request: web.Request) -> Request:
        authorization = request.headers.get("Authorization", "")
        return self._verifier.verify(
            self._bootstrap.keys(), request.method, request.raw_path, authorization, self._identity.uid, self._clock()
        )

    async def _read_body(self, request: web.Request) -> bytes:
        """The body, never more of it than a document may have."""
        too_large = f"a document has {MAX_DOCUMENT_BYTES // 2**20} MiB at most"
        if (request.content_length or 0) > MAX_DOCUMENT_BYTES:
            raise _Refused(422, too_large)
        body = bytearray()
        async for chunk in request.content.iter_any():
            body += chunk
            if len(body) > MAX_DOCUMENT_BYTES:
                raise _Refused(422, too_large)
        return bytes(body)

    async def _receive(self, asked: Request, body: bytes) -> None:
        """Raises _Refused where going on would go back, or cannot be."""
        assignment = asked.assignment
        match judge(self.in_force.assignment, assignment):
            case Verdict.OUTDATED:
                raise _Refused(409, "epoch {} revision {} is in force, which is newer".format(*self._version))
            case Verdict.CONFLICT:
                raise _Refused(409, "epoch {} revision {} is in force with other content".format(*self._version))
            case Verdict.RELABEL:
                offered = replace(self.in_force, assignment=assignment, source=ConfigSource.PUSH)
                self._enforce(offered)
                await self._keep(offered)
            case Verdict.REPLACE:
                if asked.method != "PUT":
                    raise _Refused(412, "the document of that digest is not in force here")
                content, config = await self._read_document(body, assignment.digest)
                offered = StoredConfig(config, assignment, ConfigSource.PUSH, content)
                self._enforce(offered)
                self.since = self._clock()
                await self._keep(offered)

    @property
    def _version(self) -> tuple[int, int]:
        return self.in_force.assignment.version

    async def _read_document(self, body: bytes, digest: str) -> tuple[bytes, SchedulerConfig]:
        def read() -> tuple[bytes, SchedulerConfig]:
            content = decompress(body, digest)
            return content, read_document(content)

        try:
            content, config = await asyncio.to_thread(read)
        except DocumentRejectedError as error:
            raise _Refused(422, error.message, error.path) from None
        self._check_belonging(config.cluster, config.pool)
        return content, config

    def _enforce(self, offered: StoredConfig) -> None:
        try:
            self._apply(offered)
        except DocumentRejectedError as error:
            raise _Refused(422, error.message, error.path) from None
        self.in_force = offered

    def _check_belonging(self, cluster: str, pool: PoolReference | None) -> None:
        own = self._settings.pool
        if pool != own:
            whose = f"{pool.namespace}/{pool.name}" if pool else "no pool"
            raise _Refused(401, f"the document is of {whose}, this engine of {own.namespace}/{own.name}", "pool")
        if self.in_force.config.cluster and cluster != self.in_force.config.cluster:
            raise _Refused(401, "the document is of another cluster", "cluster")

    async def _keep(self, stored: StoredConfig) -> None:
        """Save for the next start what the engine is seen to be well with: one that it dies of would kill it again."""
        if self._keeping is not None:
            self._keeping.cancel()
        if self._last_good is None:
            return
        if self._ailment() is None:
            await self._save(stored)
        else:
            self._keeping = asyncio.create_task(self._save_when_well(stored))

    async def _save_when_well(self, stored: StoredConfig) -> None:
        while self._ailment() is not None:
            await asyncio.sleep(_LOOK_SECONDS)
        await self._save(stored)

    async def _save(self, stored: StoredConfig) -> None:
        """A pod that cannot save still enforces: only its next start is poorer."""
        assert self._last_good
        try:
            await asyncio.to_thread(self._last_good.save, stored)
        except OSError as error:
            log.error("the last good config cannot be saved", extra={"fields": {"error": str(error)}})

    def _report(self, refused: _Refused | None = None) -> EngineReport:
        version, digest, num_replicas = self.in_force.assignment
        return EngineReport(
            boot_id=self.boot_id,
            epoch=version.epoch,
            revision=version.revision,
            digest=digest,
            source=self.in_force.source,
            num_replicas=num_replicas,
            ailment=(self._ailment() or "")[:_MAX_PROBLEM_CHARACTERS],
            problem=refused.message[:_MAX_PROBLEM_CHARACTERS] if refused else None,
            path=refused.path[:_MAX_PATH_CHARACTERS] if refused else "",
        )

    def _answer(
        self, asked: Request, status: int, report: EngineReport, headers: dict[str, str] | None = None
    ) -> web.Response:
        body = msgspec.json.encode(report)
        signed = {SIGNATURE_HEADER: sign_answer(self._key, asked.jti, status, body)} | (headers or {})
        return web.Response(status=status, body=body, headers=signed, content_type="application/json")

    def _refuse_unverified(self, request: web.Request, error: UnverifiedError) -> web.Response:
        """Signed where the operator has asked; anybody else learns nothing but that it is refused."""
        log.warning("a request is not believed", extra={"fields": {"from": request.remote, "problem": str(error)}})
        if error.request is None:
            return web.json_response({"problem": str(error)}, status=401)
        return self._answer(error.request, 401, self._report(_Refused(401, str(error))))


def is_local(request: web.Request) -> bool:
    """From this machine, not through a proxy, and by an address: a name may be a web page's, which rebinds it to reach
    this port. A sidecar's 127.0.0.6 is not this machine but everybody whom the sidecar lets in."""
    host = request.url.host or ""
    if _FORWARDED & {name.lower() for name in request.headers}:
        return False
    return request.remote in _OWN_ADDRESSES and (host == "localhost" or _is_loopback(host))


def _is_loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False
