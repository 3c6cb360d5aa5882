"""One signed request to one engine pod's admin port, and its verified answer.

A pod is not trusted: its answer is bounded in size and time, redirects are not followed, nothing is decompressed, and
what it says counts only if it is signed with the pool's push key.
"""

import os
import time
from dataclasses import dataclass, field

import aiohttp
import msgspec

from evenhand_policy.push_protocol import (
    CONFIG_PATH,
    MAX_REPORT_BYTES,
    NONCE_HEADER,
    REPORT_PATH,
    SIGNATURE_HEADER,
    EngineReport,
    PushKeys,
    is_answer_signed,
    sign_request,
)
from evenhand_policy.status import PodState

REQUEST_SECONDS = 5.0
CONNECT_SECONDS = 2.0
_SHOWN_CHARACTERS = 512


@dataclass(frozen=True, slots=True)
class Offer:
    """What the pods of a pool are to enforce.

    Attributes:
        document: canonical JSON.
        digest: of the document.
        epoch: of the document.
        revision: of the document.
        num_replicas: among how many engines the pool's limits are divided.
        keys: the pool's push keys.
        offered_at: monotonic time at which it was made; it decides nothing.
    """

    document: bytes = field(repr=False)
    digest: str
    epoch: int
    revision: int
    num_replicas: int
    keys: PushKeys = field(repr=False)
    offered_at: float = field(default=0.0, compare=False)

    @property
    def version(self) -> tuple[int, int]:
        """Epoch and revision."""
        return self.epoch, self.revision


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


class _WrongKeyError(PushError):
    """The pod does not know the key; it may know another one."""

    def __init__(self) -> None:
        message = "the pod does not know the pool's push key (yet): it must mount the Secret that pushKey names"
        super().__init__(PodState.REJECTED, "unauthorized", message)


class EngineClient:
    """Talks to the engines of all pools over one connection pool. Use within one event loop."""

    def __init__(self, *, request_seconds: float = REQUEST_SECONDS, connect_seconds: float = CONNECT_SECONDS) -> None:
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

    async def push(self, url: str, offer: Offer) -> EngineReport:
        """Bring the engine at `url` to enforce the offer. Raises PushError where it does not."""
        report = await self._call_with_any_key("PUT", url, offer)
        if (report.epoch, report.revision, report.digest) != (*offer.version, offer.digest):
            raise PushError(PodState.REJECTED, "mismatch", "the pod accepted the document and enforces another", report)
        return report

    async def read(self, url: str, offer: Offer) -> EngineReport:
        """What the engine at `url` enforces. Raises PushError."""
        return await self._call_with_any_key("GET", url, offer)

    async def _call_with_any_key(self, method: str, url: str, offer: Offer) -> EngineReport:
        """While keys are rotated, the pod may know only one of them."""
        for key in offer.keys[:-1]:
            try:
                return await self._call(method, url, offer, key)
            except _WrongKeyError:
                continue
        if not offer.keys:
            raise PushError(PodState.REJECTED, "no_key", "the pool has no push key: create the Secret of its pushKey")
        return await self._call(method, url, offer, offer.keys[-1])

    async def _call(self, method: str, url: str, offer: Offer, key: bytes) -> EngineReport:
        path, digest, body = (CONFIG_PATH, offer.digest, offer.document) if method == "PUT" else (REPORT_PATH, "", None)
        headers = sign_request(key, method, time.time(), path=path, num_replicas=offer.num_replicas, digest=digest)
        try:
            async with self._session.request(
                method,
                url + path,
                data=body,
                headers=headers | {"Content-Type": "application/json"},
                allow_redirects=False,
            ) as response:
                answer = await _read_bounded(response)
                signature = response.headers.get(SIGNATURE_HEADER, "")
        except TimeoutError:
            raise PushError(PodState.UNREACHABLE, "timeout", "no complete answer in time") from None
        except (aiohttp.ClientError, OSError, ValueError) as error:
            raise PushError(PodState.UNREACHABLE, "connection", _describe(error)) from None
        if not is_answer_signed(key, headers[NONCE_HEADER], response.status, answer, signature):
            if response.status == 401:
                raise _WrongKeyError
            message = f"the answer (status {response.status}) is not signed with the pool's push key"
            raise PushError(PodState.UNREACHABLE, "unsigned", message)
        return _read_answer(response.status, answer)


async def _read_bounded(response: aiohttp.ClientResponse) -> bytes:
    body = bytearray()
    async for chunk in response.content.iter_any():
        body += chunk
        if len(body) > MAX_REPORT_BYTES:
            response.close()
            raise PushError(PodState.UNREACHABLE, "too_large", f"the answer is larger than {MAX_REPORT_BYTES} bytes")
    return bytes(body)


def _read_answer(status: int, body: bytes) -> EngineReport:
    """The report in an answer that is signed."""
    try:
        report = msgspec.json.decode(body, type=EngineReport)
    except msgspec.DecodeError:
        raise PushError(PodState.UNREACHABLE, "malformed", f"the answer (status {status}) cannot be read") from None
    if status == 200:
        return report
    reason = {401: "refused", 409: "outdated", 422: "rejected"}.get(status, "unexpected")
    problem = f"{report.path}: {report.problem}" if report.path else report.problem or "no reason given"
    is_own = status != 401  # what a pod of another pool enforces is none of ours
    message = f"{problem[:_SHOWN_CHARACTERS]} (status {status})"
    raise PushError(PodState.REJECTED, reason, message, report if is_own else None)


def _describe(error: Exception) -> str:
    """In few and stable words: what changes at every attempt would be written into the status at every attempt."""
    if isinstance(error, aiohttp.ClientConnectorError):
        return f"cannot connect: {os.strerror(error.os_error.errno) if error.os_error.errno else 'no such address'}"
    if isinstance(error, aiohttp.ServerDisconnectedError | ConnectionResetError):
        return "the connection was closed before the answer was complete"
    return f"the request failed: {type(error).__name__}"
