"""How operator and engine prove to each other who they are, on the engine's admin port.

Only the operator can sign a request (Ed25519); pods hold its public keys. A request is signed over everything that decides
what it does, the pod that it is for included, so it can be neither forged nor changed nor, thanks to a nonce and a short
time, replayed, here or at another pod. Nothing is hidden, and nothing needs to be: a document holds hashes of keys only.

An engine process makes a key pair at its start; its boot id is the public half, and it signs what it answers over the
request's nonce. That the boot id is of a certain pod is shown by the pod's projected ServiceAccount token, for an audience
that only the operator takes, in the answer to a signed GET.

    GET   /v1/scheduler-config/report    what is in force; with the token, and what the engine understands
    PATCH /v1/scheduler-config           the document in force is also that of this version, for so many replicas
    PUT   /v1/scheduler-config           enforce the document in the body (zlib)
    200 | 401 | 409 | 412 | 422          X-Evenhand-Signature, body: an EngineReport

Each request has `Authorization: Bearer` and a JWT whose claims are a `Request`. A 401 to somebody unknown is not signed;
412: the document of that digest is not in force, so it has to be sent.
"""

import secrets
from enum import StrEnum
from typing import Annotated, Any

import jwt
import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from msgspec import Meta

from evenhand_policy.config import Natural, PoolReference, Positive
from evenhand_policy.push_document import body_digest
from evenhand_policy.signatures import PublicKeys, is_signed_by_text, sign
from evenhand_policy.version import Assignment, Version

CONFIG_PATH = "/v1/scheduler-config"
REPORT_PATH = "/v1/scheduler-config/report"
MAX_REPORT_BYTES = 32 * 2**10
MAX_CLOCK_SKEW_SECONDS = 60.0
POD_TOKEN_AUDIENCE = "evenhand-operator"

SIGNATURE_HEADER = "X-Evenhand-Signature"
POD_TOKEN_HEADER = "X-Evenhand-Pod-Token"

_ALGORITHM = "EdDSA"
_ANSWER = "answer"


class ConfigSource(StrEnum):
    """Where an engine has its config from."""

    PUSH = "Push"
    BOOTSTRAP = "Bootstrap"  # mounted Secrets
    LAST_GOOD = "LastGood"  # the pod's own file
    FILES = "Files"  # policy files, without an operator
    BUILT_IN = "BuiltIn"  # nothing was ever given


class EngineReport(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """What an engine enforces, as it says itself; members that a newer one adds are ignored.

    Attributes:
        boot_id: public key of the engine process in hexadecimal; another one after every restart.
        epoch: of the assignment in force; 0 where there is none.
        revision: of the assignment in force.
        digest: of the document in force.
        source: where the document came from: a ConfigSource, or what a newer engine calls it.
        num_replicas: among how many engines the pool's limits are divided.
        ailment: what is wrong with the engine, such as that its core does not enforce the document yet; empty: nothing.
        understands: members of a document that it knows (`evenhand_policy.compact`); told in answer to a GET.
        backend: what generates: evenhand, or the engine that a sidecar stands before.
        problem: why the request was refused; None where it was not.
        path: the field of the refused document that is at fault; empty: the document as a whole.
    """

    boot_id: Annotated[str, Meta(max_length=64)]
    epoch: Natural
    revision: Natural
    digest: Annotated[str, Meta(max_length=71)]
    source: Annotated[str, Meta(max_length=64)]
    num_replicas: Positive = 1
    ailment: Annotated[str, Meta(max_length=1024)] = ""
    understands: Annotated[tuple[Annotated[str, Meta(max_length=256)], ...], Meta(max_length=1024)] = ()
    backend: Annotated[str, Meta(max_length=64)] = ""
    problem: Annotated[str, Meta(max_length=1024)] | None = None
    path: Annotated[str, Meta(max_length=256)] = ""

    @property
    def assignment(self) -> Assignment:
        """What is in force."""
        return Assignment(Version(self.epoch, self.revision), self.digest, self.num_replicas)


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """Claims of the token of a request; those that a newer operator adds are ignored.

    Attributes:
        method: of the request.
        path: of the request.
        aud: uid of the pod that it is for.
        jti: nonce.
        iat: Unix time in seconds.
        cluster: uid of the namespace kube-system.
        pool: the pod's pool.
        epoch, revision, digest, replicas: the assignment; of a GET they mean nothing.
    """

    method: str
    path: str
    aud: str
    jti: Annotated[str, Meta(min_length=32, max_length=64)]
    iat: float
    cluster: str
    pool: PoolReference
    epoch: Positive
    revision: Positive
    digest: Annotated[str, Meta(max_length=71)]
    replicas: Positive

    @property
    def assignment(self) -> Assignment:
        """What the engine is to enforce."""
        return Assignment(Version(self.epoch, self.revision), self.digest, self.replicas)


class UnsignedError(Exception):
    """A request is signed by nobody who is known; the message says why."""


def make_request(
    method: str, pod: str, now: float, *, cluster: str, pool: PoolReference, assignment: Assignment
) -> Request:
    """A request to the pod of that uid at Unix time `now`."""
    return Request(
        method=method,
        path=REPORT_PATH if method == "GET" else CONFIG_PATH,
        aud=pod,
        jti=secrets.token_hex(16),
        iat=now,
        cluster=cluster,
        pool=pool,
        epoch=assignment.version.epoch,
        revision=assignment.version.revision,
        digest=assignment.digest,
        replicas=assignment.num_replicas,
    )


def sign_request(key: Ed25519PrivateKey, request: Request) -> dict[str, str]:
    """Headers of the request."""
    token = jwt.encode(msgspec.to_builtins(request), key, algorithm=_ALGORITHM)
    return {"Authorization": f"Bearer {token}"}


def read_request(keys: PublicKeys, authorization: str) -> Request:
    """The request in a header.

    Raises:
        UnsignedError: none of the keys signed it, or it is not understood.
    """
    scheme, _, token = authorization.partition(" ")
    if scheme != "Bearer" or not token:
        raise UnsignedError("it is not signed")
    claims = _claims(keys, token.strip())
    if claims is None:
        raise UnsignedError("the signature is by none of the operator's keys that this engine knows")
    try:
        return msgspec.convert(claims, Request)
    except msgspec.ValidationError as error:
        raise UnsignedError(f"the request is not understood: {error}") from None


def sign_claims(key: Ed25519PrivateKey, claims: msgspec.Struct) -> bytes:
    """A JWT that has no end, for what is stored."""
    return jwt.encode(msgspec.to_builtins(claims), key, algorithm=_ALGORITHM).encode()


def read_claims(keys: PublicKeys, token: bytes) -> dict[str, Any] | None:
    """Claims of such a JWT; None where none of the keys signed it."""
    return _claims(keys, token.decode("ascii", "replace"))


def sign_answer(key: Ed25519PrivateKey, nonce: str, status: int, body: bytes) -> str:
    """Value of `SIGNATURE_HEADER` of the answer to the request with `nonce`."""
    return sign(key, _ANSWER, nonce, str(status), body_digest(body))


def is_answer_signed(boot_id: str, nonce: str, status: int, body: bytes, signature: str) -> bool:
    """Whether the engine process with this boot id answered so to the request with `nonce`."""
    return is_signed_by_text(boot_id, signature, _ANSWER, nonce, str(status), body_digest(body))


def _claims(keys: PublicKeys, token: str) -> dict[str, Any] | None:
    """What is signed; who it is for and when it was said is for the caller to look at."""
    unchecked = {"verify_aud": False, "verify_iat": False, "verify_exp": False, "verify_nbf": False}
    for key in keys:
        try:
            return jwt.decode(token, key, algorithms=[_ALGORITHM], options=unchecked)  # type: ignore[arg-type]
        except jwt.PyJWTError:
            continue
    return None
