"""The document as it is sent and stored: compressed, and read with every doubt an error and nothing repaired."""

import functools
import hashlib
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain

import msgspec

from evenhand_policy.compact import Loss, Members, compact, members_of
from evenhand_policy.config import DEFAULT_TENANT_ID, SchedulerConfig
from evenhand_policy.credentials import read_account

SCHEMA_VERSION = 1
_ADDED_LATER = frozenset(
    {
        "gateway.tenantHeaders",
        "prices.contextToken",
        "tenants.fairness",
        "tenants.fairness=FIFO",
        "tenants.fairness=PerUser",
        "tenants.fairness=Priority",
    }
)
"""Members that not every engine of this schema version knows: each that is added belongs here."""
MAX_DOCUMENT_BYTES = 32 * 2**20
_COMPRESSION_LEVEL = 1  # more takes twice as long and saves a tenth: what fills a document are hashes


@dataclass(frozen=True, slots=True)
class Document:
    """A config as it is sent.

    Attributes:
        digest: `sha256:` and the hexadecimal SHA-256 of the canonical JSON.
        compressed: the canonical JSON by zlib.
        size: bytes of the canonical JSON.
        members: what is set in it, and so what a pod has to understand.
        losses: what is set and left out, since a pod would not understand it.
    """

    digest: str
    compressed: bytes = field(repr=False)
    size: int = field(compare=False)
    members: Members = field(default=frozenset(), compare=False, repr=False)
    losses: tuple[Loss, ...] = field(default=(), compare=False)


def body_digest(body: bytes) -> str:
    """`sha256:` and the hexadecimal SHA-256 of a body; a document's digest is that of its canonical JSON."""
    return "sha256:" + hashlib.sha256(body).hexdigest()


def encode_document(config: SchedulerConfig, understood: Members | None = None) -> Document:
    """The config's document for readers that understand these members; None: it is ours."""
    value, members, losses = compact(config, understood)
    content = msgspec.json.encode(value, order="sorted")
    compressed = zlib.compress(content, _COMPRESSION_LEVEL)
    return Document(body_digest(content), compressed, len(content), members, losses)


def decompress(compressed: bytes, digest: str) -> bytes:
    """The canonical JSON, never more of it than a document may have.

    Raises:
        DocumentRejectedError: it cannot be decompressed, or is not the one of that digest.
    """
    decompressor = zlib.decompressobj()
    try:
        content = decompressor.decompress(compressed, MAX_DOCUMENT_BYTES)
    except zlib.error as error:
        raise DocumentRejectedError("", f"it cannot be decompressed: {error}") from None
    if body_digest(content) != digest or decompressor.unused_data:
        raise DocumentRejectedError("", "the content is not that of its digest")
    return content


@functools.cache
def understood_members() -> Members:
    """What this version of the package understands of a document."""
    return members_of(SchedulerConfig)


def members_known_by(told: Iterable[str]) -> Members:
    """What an engine understands that says that it understands these.

    An engine may lack what was added later; all else every engine knows, whatever it says. So none that is broken into can
    have keys, limits or who is suspended left out of the document of all others.
    """
    every = understood_members()
    known = (every - _ADDED_LATER) | frozenset(told)
    return every if known >= every else known


class DocumentRejectedError(ValueError):
    """A document cannot be enforced.

    Attributes:
        path: the field at fault, such as `tenants[3].weight`; empty for the document as a whole.
        message: what is wrong.
    """

    def __init__(self, path: str, message: str) -> None:
        super().__init__(f"{path}: {message}" if path else message)
        self.path = path
        self.message = message


class _Versioned(msgspec.Struct, rename="camel"):
    schema_version: int = SCHEMA_VERSION


def read_document(body: bytes) -> SchedulerConfig:
    """The config in a document.

    Raises:
        DocumentRejectedError: it is not JSON, of another schema version, out of bounds or contradicts itself.
    """
    try:
        config = msgspec.json.decode(body, type=SchedulerConfig)
    except msgspec.DecodeError as error:
        _check_version(_version(body))
        message, _, path = str(error).partition(" - at `$")
        raise DocumentRejectedError(path.rstrip("`").lstrip("."), message) from None
    _check_version(config.schema_version)
    for path, message in _contradictions(config):
        raise DocumentRejectedError(path, message)
    return config


def open_document(compressed: bytes, digest: str) -> SchedulerConfig:
    """The config in a document as it is sent and stored, which is to be that of this digest.

    Raises:
        DocumentRejectedError: as `decompress` and `read_document` do.
    """
    return read_document(decompress(compressed, digest))


def _version(body: bytes) -> int:
    """Of a document that is otherwise not understood; ours, where not even that is."""
    try:
        return msgspec.json.decode(body, type=_Versioned).schema_version
    except msgspec.DecodeError:
        return SCHEMA_VERSION


def _check_version(version: int) -> None:
    if version != SCHEMA_VERSION:
        advice = f"version {version} is not {SCHEMA_VERSION}: operator and engine are too far apart; upgrade one"
        raise DocumentRejectedError("schemaVersion", advice)


def _malformed_hashes(config: SchedulerConfig) -> Iterator[tuple[str, str]]:
    """Key hashes that are none. All are looked at in one go: to match each would take as long as all else together."""
    places = [("gateway.keyHashes", config.gateway.key_hashes)]
    places += [(f"tenants[{index}].keyHashes", tenant.key_hashes) for index, tenant in enumerate(config.tenants)]
    if not _are_hashes(list(chain.from_iterable(values for _, values in places))):
        for path, values in places:
            yield from (
                (f"{path}[{index}]", "not sha256: and 64 digits of hexadecimal")
                for index, value in enumerate(values)
                if not _are_hashes([value])
            )


def _are_hashes(values: Sequence[str]) -> bool:
    """Whether each, of the length of one, is a hash."""
    others = "".join(values).encode("ascii", "replace").translate(None, b"0123456789abcdef")
    return others == b"sh:" * len(values) and all(value.startswith("sha256:") for value in values)


def _contradictions(config: SchedulerConfig) -> Iterator[tuple[str, str]]:
    yield from _malformed_hashes(config)
    names = [tenant.tenant_id for tenant in config.tenants]
    if names != sorted(set(names)):
        yield "tenants", "not sorted by tenantId, or a tenant is in it twice"
    if DEFAULT_TENANT_ID in names:
        yield "tenants", f"the tenant {DEFAULT_TENANT_ID} stands for all others and cannot be configured"
    if sum(tenant.kv_cache.guaranteed_percent for tenant in config.tenants) > 100:
        yield "tenants", "the kvCache guarantees exceed 100 percent together"
    for index, tenant in enumerate(config.tenants):
        if tenant.kv_cache.guaranteed_percent > tenant.kv_cache.max_percent:
            yield f"tenants[{index}].kvCache", "guaranteedPercent exceeds maxPercent"
    yield from _shared_identities(config)


def _shared_identities(config: SchedulerConfig) -> Iterator[tuple[str, str]]:
    """An identity of two tenants would make it a matter of chance who pays."""
    tenants = config.tenants
    yield from _repeated("keyHashes", config.gateway.key_hashes, [tenant.key_hashes for tenant in tenants])
    accounts = [[read_account(each)[0] for each in tenant.service_accounts] for tenant in tenants]
    yield from _repeated("serviceAccounts", (), accounts)
    yield from _repeated("headerValues", (), [tenant.header_values for tenant in tenants])


def _repeated(
    field: str, claimed: Iterable[str], values_by_tenant: Sequence[Sequence[str]]
) -> Iterator[tuple[str, str]]:
    seen = set(claimed)
    every = list(chain.from_iterable(values_by_tenant))
    if seen.isdisjoint(every) and len(set(every)) == len(every):
        return
    for index, values in enumerate(values_by_tenant):
        for value in values:
            if value in seen:
                yield f"tenants[{index}].{field}", "another tenant, the gateway or this one has the same"
            seen.add(value)
