"""The engine's half of the push, on the admin port: verifies who asks, and decides what may take the place of what is in force.

`evenhand_policy.version.judge` decides; a lower version never takes the place of a higher one, so that a leader that was
replaced, a late or a repeated request do no harm. What is in force belongs to `config_in_force`.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
from aiohttp import web
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from evenhand_engine.frontend.config_in_force import ConfigInForce
from evenhand_engine.frontend.config_store import BootstrapFolder, ConfigDocument
from evenhand_engine.frontend.local_request import is_local
from evenhand_engine.frontend.pod_identity import PodIdentity
from evenhand_engine.frontend.request_verifier import RequestVerifier, UnverifiedError
from evenhand_policy.config import PoolReference, SchedulerConfig
from evenhand_policy.push_document import (
    MAX_DOCUMENT_BYTES,
    DocumentRejectedError,
    open_document,
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

_MAX_PROBLEM_CHARACTERS = 1000
_MAX_PATH_CHARACTERS = 256


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
    """Receives documents, and puts what may be enforced in force; at the start the newest of what is stored, if anything is.

    Args:
        ailment: what is wrong with the engine, such as that its core does not enforce yet what was applied; None: nothing.
        backend: what generates.

    Attributes:
        boot_id: identity of this process: the public half of a key that only it has.
        in_force: where documents end.
    """

    def __init__(
        self,
        settings: PushSettings,
        in_force: ConfigInForce,
        *,
        ailment: Callable[[], str | None] = lambda: None,
        backend: Callable[[], str] = lambda: "evenhand",
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.in_force = in_force
        self._pool = settings.pool
        self._ailment = ailment
        self._backend = backend
        self._clock = clock
        self._key = Ed25519PrivateKey.generate()
        self.boot_id = public_text(self._key)
        self._bootstrap = BootstrapFolder(settings.bootstrap)
        self._identity = PodIdentity(settings.pod_token)
        self._verifier = RequestVerifier()
        self._changing = asyncio.Lock()
        self._start()

    def _start(self) -> None:
        """Enforce the newest of what is stored and can be enforced."""
        found = [self._bootstrap.read(), self.in_force.last_good()]
        stored_ones = [stored for stored in found if stored is not None]
        for stored in sorted(stored_ones, key=lambda stored: stored.assignment.version, reverse=True):
            try:
                self._check_belonging(stored.config.cluster, stored.config.pool)
                self.in_force.replace(stored)
            except (_Refused, DocumentRejectedError) as error:
                fields = {"source": str(stored.source), "error": str(error)}
                log.warning("a stored config cannot be enforced", extra={"fields": fields})
                continue
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
            self._note(refused)
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
        before, assignment = self.in_force.document, asked.assignment
        version = "epoch {} revision {} is in force".format(*before.assignment.version)
        match judge(before.assignment, assignment):
            case Verdict.IN_FORCE:
                self.in_force.confirm()
            case Verdict.OUTDATED:
                raise _Refused(409, f"{version}, which is newer")
            case Verdict.CONFLICT:
                raise _Refused(409, f"{version} with other content")
            case Verdict.RELABEL:
                await self._enforce(replace(before, assignment=assignment, source=ConfigSource.PUSH))
            case Verdict.REPLACE:
                if asked.method != "PUT":
                    raise _Refused(412, "the document of that digest is not in force here")
                config = await self._read_document(body, assignment.digest)
                await self._enforce(ConfigDocument(config, assignment, ConfigSource.PUSH, body))

    async def _read_document(self, body: bytes, digest: str) -> SchedulerConfig:
        try:
            config = await asyncio.to_thread(open_document, body, digest)
        except DocumentRejectedError as error:
            raise _Refused(422, error.message, error.path) from None
        self._check_belonging(config.cluster, config.pool)
        return config

    async def _enforce(self, offered: ConfigDocument) -> None:
        try:
            self.in_force.replace(offered)
        except DocumentRejectedError as error:
            raise _Refused(422, error.message, error.path) from None
        await self.in_force.keep(self._ailment)

    def _check_belonging(self, cluster: str, pool: PoolReference | None) -> None:
        own, own_cluster = self._pool, self.in_force.config.cluster
        if pool != own:
            whose = f"{pool.namespace}/{pool.name}" if pool else "no pool"
            raise _Refused(401, f"the document is of {whose}, this engine of {own.namespace}/{own.name}", "pool")
        if own_cluster and cluster != own_cluster:
            raise _Refused(401, "the document is of another cluster", "cluster")

    def _note(self, refused: _Refused) -> None:
        """A document that cannot be enforced is a rejected config; anything else says nothing about a config."""
        if refused.status == 422:
            self.in_force.reject(f"{refused.path}: {refused.message}" if refused.path else refused.message)
        else:
            fields = {"status": refused.status, "problem": refused.message, "path": refused.path}
            log.warning("a pushed config is refused", extra={"fields": fields})

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
            backend=self._backend(),
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
