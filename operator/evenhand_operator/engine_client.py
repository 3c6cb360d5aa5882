"""One signed request to one engine pod's admin port, and its verified answer.

A pod is not trusted: its answer is bounded in size and time, redirects are not followed, nothing is decompressed, and
what it says counts only if it is signed by the engine process that has proved to run in that pod.
"""

import os
from collections.abc import Callable

import aiohttp
import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from evenhand_operator import metrics
from evenhand_operator.clock import SYSTEM_CLOCK, Clock
from evenhand_operator.objects import EnginePod
from evenhand_operator.offer import Offer
from evenhand_operator.pod_prover import PodProver
from evenhand_policy.push_protocol import (
    MAX_REPORT_BYTES,
    POD_TOKEN_HEADER,
    SIGNATURE_HEADER,
    EngineReport,
    is_answer_signed,
    make_request,
    sign_request,
)
from evenhand_policy.status import PodState

REQUEST_SECONDS = 5.0
CONNECT_SECONDS = 2.0
_SHOWN_CHARACTERS = 512


class PushError(Exception):
    """A pod does not enforce what it should.

    Attributes:
        state: what that makes of the pod.
        reason: short and one of few, for metrics.
        report: what the pod says that it enforces; None where it said nothing that counts.
    """

    def __init__(self, state: PodState, reason: str, message: str, report: EngineReport | None = None) -> None:
        super().__init__(message)
        self.state = state
        self.reason = reason
        self.message = message
        self.report = report


class EngineClient:
    """Talks to the engines of all pools over one connection pool. Use within one event loop.

    Every request raises PushError where the pod does not do what it should.

    Args:
        key: the private key to sign with.
        prover: tells which pod an engine process runs in.
    """

    def __init__(
        self,
        key: Callable[[], Ed25519PrivateKey],
        prover: PodProver,
        *,
        request_seconds: float = REQUEST_SECONDS,
        connect_seconds: float = CONNECT_SECONDS,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        self._clock = clock
        self._key = key
        self._prover = prover
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, limit_per_host=2, keepalive_timeout=75),
            timeout=aiohttp.ClientTimeout(total=request_seconds, sock_connect=connect_seconds),
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            trust_env=False,
        )

    async def close(self) -> None:
        """Closes all connections."""
        await self._session.close()

    async def read(self, pod: EnginePod, offer: Offer) -> EngineReport:
        """What the engine enforces, proved to be in that pod. Nothing changes."""
        report, token = await self._call("GET", pod, offer)
        if problem := self._prover.problem(token, pod):
            raise PushError(PodState.REJECTED, "unproven", f"who answers is not shown to be this pod: {problem}")
        return report

    async def relabel(self, pod: EnginePod, offer: Offer, boot_id: str) -> EngineReport:
        """Tell the version and the number of replicas of the document that the engine process enforces already.

        Of another process than the one with that boot id nothing counts.
        """
        return await self._told("PATCH", pod, offer, boot_id)

    async def send(self, pod: EnginePod, offer: Offer, boot_id: str) -> EngineReport:
        """Bring the engine process to enforce the document."""
        metrics.PUSHED_BYTES.inc(len(offer.document.compressed))
        metrics.DOCUMENTS_SENT.inc()
        return await self._told("PUT", pod, offer, boot_id, offer.document.compressed)

    async def _told(
        self, method: str, pod: EnginePod, offer: Offer, boot_id: str, body: bytes | None = None
    ) -> EngineReport:
        report, _ = await self._call(method, pod, offer, boot_id, body)
        if report.assignment != offer.assignment:
            raise PushError(PodState.REJECTED, "mismatch", "the pod accepted the document and enforces another", report)
        return report

    async def _call(
        self, method: str, pod: EnginePod, offer: Offer, boot_id: str = "", body: bytes | None = None
    ) -> tuple[EngineReport, str]:
        """The report, and the pod's token where it was given."""
        request = make_request(
            method, pod.uid, self._clock.wall(), cluster=offer.cluster, pool=offer.pool, assignment=offer.assignment
        )
        headers = sign_request(self._key(), request) | {"Content-Type": "application/zlib"}
        try:
            async with self._session.request(
                method, pod.url + request.path, data=body, headers=headers, allow_redirects=False
            ) as response:
                answer = await _read_bounded(response)
        except TimeoutError:
            raise PushError(PodState.UNREACHABLE, "timeout", "no complete answer in time") from None
        except (aiohttp.ClientError, OSError, ValueError) as error:
            raise PushError(PodState.UNREACHABLE, "connection", _describe(error)) from None
        signature = response.headers.get(SIGNATURE_HEADER, "")
        report = _read_signed(request.jti, response.status, answer, signature)
        if boot_id and report.boot_id != boot_id:
            raise PushError(PodState.UNREACHABLE, "restarted", "another process answers than before")
        _check_status(response.status, report)
        return report, response.headers.get(POD_TOKEN_HEADER, "")


def _read_signed(nonce: str, status: int, body: bytes, signature: str) -> EngineReport:
    """The report, signed by the process that it says it is of."""
    if not signature:
        if status == 401:
            message = "the pod does not know the operator's key (yet), or takes itself for another pod"
            raise PushError(PodState.REJECTED, "unauthorized", message)
        raise PushError(PodState.UNREACHABLE, "unsigned", f"the answer (status {status}) is not signed")
    try:
        report = msgspec.json.decode(body, type=EngineReport)
    except msgspec.DecodeError:
        raise PushError(PodState.UNREACHABLE, "malformed", f"the answer (status {status}) cannot be read") from None
    if not is_answer_signed(report.boot_id, nonce, status, body, signature):
        message = f"the answer (status {status}) is not signed by the engine that it is of"
        raise PushError(PodState.UNREACHABLE, "unsigned", message)
    return report


def _check_status(status: int, report: EngineReport) -> None:
    if status == 200:
        return
    reason = {401: "refused", 409: "outdated", 412: "absent", 422: "rejected"}.get(status, "unexpected")
    problem = f"{report.path}: {report.problem}" if report.path else report.problem or "no reason given"
    is_own = status != 401  # what a pod of another pool enforces is none of ours
    message = f"{problem[:_SHOWN_CHARACTERS]} (status {status})"
    raise PushError(PodState.REJECTED, reason, message, report if is_own else None)


async def _read_bounded(response: aiohttp.ClientResponse) -> bytes:
    body = bytearray()
    async for chunk in response.content.iter_any():
        body += chunk
        if len(body) > MAX_REPORT_BYTES:
            response.close()
            raise PushError(PodState.UNREACHABLE, "too_large", f"the answer is larger than {MAX_REPORT_BYTES} bytes")
    return bytes(body)


def _describe(error: Exception) -> str:
    """In few and stable words: what changes at every attempt would be written into the status at every attempt."""
    if isinstance(error, aiohttp.ClientConnectorError):
        return f"cannot connect: {os.strerror(error.os_error.errno) if error.os_error.errno else 'no such address'}"
    if isinstance(error, aiohttp.ServerDisconnectedError | ConnectionResetError):
        return "the connection was closed before the answer was complete"
    return f"the request failed: {type(error).__name__}"
