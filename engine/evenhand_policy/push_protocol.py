"""How operator and engine prove to each other who they are, on the engine's admin port.

Both hold the pool's push keys: the values of one Secret, more than one only while keys are rotated. A request is signed
over everything that decides what it does, its answer over the request's nonce, the status and the body. So neither can
be forged, changed or, thanks to the nonce and a short time, replayed; nothing is hidden, and nothing needs to be: a
document holds hashes of keys only.

    PUT /v1/scheduler-config           X-Evenhand-{Nonce,Time,Replicas,Digest,Signature}, body: the document
    GET /v1/scheduler-config/report    the same headers, no body
    200 | 401 | 409 | 422              X-Evenhand-Signature, body: an EngineReport

A 401 whose request was not signed by a known key cannot be signed either.
"""

import hashlib
import hmac
import secrets
from collections.abc import Mapping
from enum import StrEnum
from typing import Annotated, NamedTuple

import msgspec
from msgspec import Meta

from evenhand_policy.credentials import is_strong

CONFIG_PATH = "/v1/scheduler-config"
REPORT_PATH = "/v1/scheduler-config/report"
MAX_DOCUMENT_BYTES = 32 * 2**20
MAX_REPORT_BYTES = 16 * 2**10
MAX_CLOCK_SKEW_SECONDS = 60.0
MAX_PUSH_KEYS = 8

NONCE_HEADER = "X-Evenhand-Nonce"
TIME_HEADER = "X-Evenhand-Time"
REPLICAS_HEADER = "X-Evenhand-Replicas"
DIGEST_HEADER = "X-Evenhand-Digest"
SIGNATURE_HEADER = "X-Evenhand-Signature"

_MAX_REMEMBERED_NONCES = 100_000
_NONCE_CHARACTERS = 32
_REQUEST, _ANSWER = "request", "answer"

PushKeys = tuple[bytes, ...]
"""The keys with which a message may be signed, in order of preference; empty: nobody is believed."""


class ConfigSource(StrEnum):
    """Where an engine has its config from."""

    PUSH = "Push"
    BOOTSTRAP = "Bootstrap"  # mounted Secrets
    LAST_GOOD = "LastGood"  # the pod's own file
    FILES = "Files"  # policy files, without an operator
    BUILT_IN = "BuiltIn"  # nothing was ever given: everybody shares evenly


class EngineReport(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """What an engine enforces, as it says itself; members that a newer one adds are ignored.

    Attributes:
        boot_id: identity of the engine process; another one after every restart.
        epoch: of the document in force; 0 where nothing was ever pushed.
        revision: of the document in force.
        digest: of the document in force.
        source: where the document came from: a ConfigSource, or what a newer engine calls it.
        num_replicas: among how many engines the pool's limits are divided.
        problem: why the request was refused; None where it was not.
        path: the field of the refused document that is at fault; empty: the document as a whole.
    """

    boot_id: Annotated[str, Meta(max_length=64)]
    epoch: Annotated[int, Meta(ge=0)]
    revision: Annotated[int, Meta(ge=0)]
    digest: Annotated[str, Meta(max_length=71)]
    source: Annotated[str, Meta(max_length=64)]
    num_replicas: Annotated[int, Meta(ge=1)] = 1
    problem: Annotated[str, Meta(max_length=1024)] | None = None
    path: Annotated[str, Meta(max_length=256)] = ""


class SignedRequest(NamedTuple):
    """What a request's signature covers. `time_ms` is Unix time in milliseconds; `digest` is that of the body."""

    method: str
    path: str
    nonce: str
    time_ms: int
    num_replicas: int
    digest: str


class UnverifiedError(Exception):
    """A request is not believed; the message says why, and `key` is set where its signature was right."""

    def __init__(self, message: str, key: bytes | None = None) -> None:
        super().__init__(message)
        self.key = key


def read_push_keys(values: Mapping[str, bytes]) -> PushKeys:
    """The usable keys of a Secret, or of the folder where it is mounted, by name: at most 8, weak ones left out."""
    keys = (values[name].strip() for name in sorted(values) if not name.startswith("."))
    return tuple(key for key in keys if is_strong(key))[:MAX_PUSH_KEYS]


def body_digest(body: bytes) -> str:
    """`sha256:` and the hexadecimal SHA-256 of a body; a document's digest is that of its canonical JSON."""
    return "sha256:" + hashlib.sha256(body).hexdigest()


def sign_request(
    key: bytes, method: str, now: float, *, path: str = CONFIG_PATH, num_replicas: int = 1, digest: str = ""
) -> dict[str, str]:
    """Headers of a request at Unix time `now`. Without `digest` the body is empty; `path` includes a query."""
    nonce = secrets.token_hex(_NONCE_CHARACTERS // 2)
    request = SignedRequest(method, path, nonce, int(now * 1000), num_replicas, digest or body_digest(b""))
    return {
        NONCE_HEADER: request.nonce,
        TIME_HEADER: str(request.time_ms),
        REPLICAS_HEADER: str(request.num_replicas),
        DIGEST_HEADER: request.digest,
        SIGNATURE_HEADER: sign(key, _REQUEST, *map(str, request)),
    }


def sign_answer(key: bytes, nonce: str, status: int, body: bytes) -> str:
    """Value of `SIGNATURE_HEADER` of the answer to the request with `nonce`."""
    return sign(key, _ANSWER, nonce, str(status), body_digest(body))


def is_answer_signed(key: bytes, nonce: str, status: int, body: bytes, signature: str) -> bool:
    """Whether the holder of `key` answered so to the request with `nonce`."""
    return is_signed(key, signature, _ANSWER, nonce, str(status), body_digest(body))


class RequestVerifier:
    """The engine's side: decides who is believed, and remembers the nonces of those who were until they expire."""

    def __init__(self) -> None:
        self._expiry_by_nonce: dict[str, float] = {}  # in the order in which they came, so nearly that of expiry

    def verify(
        self, keys: PushKeys, method: str, path: str, headers: Mapping[str, str], now: float
    ) -> tuple[SignedRequest, bytes]:
        """The request and the key that signed it. `now` is Unix time in seconds.

        Raises:
            UnverifiedError: headers are missing or wrong, no known key signed it, its time is more than
                `MAX_CLOCK_SKEW_SECONDS` away, or it was here before.
        """
        request = _read_headers(method, path, headers)
        signature = headers.get(SIGNATURE_HEADER, "")
        candidates = [key for key in keys if is_signed(key, signature, _REQUEST, *map(str, request))]
        if not candidates:
            raise UnverifiedError("the signature is by none of this engine's push keys")
        key = candidates[0]
        if abs(request.time_ms / 1000 - now) > MAX_CLOCK_SKEW_SECONDS:
            raise UnverifiedError(f"its time is {now - request.time_ms / 1000:+.0f} s from this engine's clock", key)
        self._forget_expired(now)
        if request.nonce in self._expiry_by_nonce:
            raise UnverifiedError("the request was sent before", key)
        if len(self._expiry_by_nonce) >= _MAX_REMEMBERED_NONCES:
            raise UnverifiedError("too many requests within a short time", key)
        self._expiry_by_nonce[request.nonce] = now + 2 * MAX_CLOCK_SKEW_SECONDS
        return request, key

    def _forget_expired(self, now: float) -> None:
        while self._expiry_by_nonce:
            nonce = next(iter(self._expiry_by_nonce))
            if self._expiry_by_nonce[nonce] > now:
                return
            del self._expiry_by_nonce[nonce]


def sign(key: bytes, purpose: str, *parts: str) -> str:
    """HMAC-SHA256 in hexadecimal over texts without line feeds; one of another purpose is never mistaken for it."""
    message = "\n".join(("evenhand-push-v1", purpose, *parts))
    return hmac.new(key, message.encode("utf-8", "surrogateescape"), hashlib.sha256).hexdigest()


def is_signed(key: bytes, signature: str, purpose: str, *parts: str) -> bool:
    """Whether the holder of `key` made the signature; compared in constant time."""
    return hmac.compare_digest(sign(key, purpose, *parts).encode(), signature.encode("utf-8", "replace"))


def _read_headers(method: str, path: str, headers: Mapping[str, str]) -> SignedRequest:
    nonce, digest = headers.get(NONCE_HEADER, ""), headers.get(DIGEST_HEADER, "")
    time_ms, num_replicas = (_number(headers.get(name, "")) for name in (TIME_HEADER, REPLICAS_HEADER))
    if len(nonce) != _NONCE_CHARACTERS or not digest or time_ms is None or not num_replicas:
        raise UnverifiedError("it is not signed: a header is missing or malformed")
    return SignedRequest(method, path, nonce, time_ms, num_replicas, digest)


def _number(text: str) -> int | None:
    return int(text) if text.isascii() and text.isdigit() and len(text) < 16 else None
