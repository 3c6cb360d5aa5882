"""Reading a document that came over the network or from disk: every doubt is an error, nothing is repaired."""

from collections.abc import Iterable, Iterator, Sequence

import msgspec

from evenhand_policy.config import DEFAULT_TENANT_ID, SchedulerConfig

SCHEMA_VERSION = 1


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


def _contradictions(config: SchedulerConfig) -> Iterator[tuple[str, str]]:
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
    yield from _repeated("serviceAccounts", (), [tenant.service_accounts for tenant in tenants])
    yield from _repeated("headerValues", (), [tenant.header_values for tenant in tenants])


def _repeated(
    field: str, claimed: Iterable[str], values_by_tenant: Iterable[Sequence[str]]
) -> Iterator[tuple[str, str]]:
    seen = set(claimed)
    for index, values in enumerate(values_by_tenant):
        for value in values:
            if value in seen:
                yield f"tenants[{index}].{field}", "another tenant, the gateway or this one has the same"
            seen.add(value)
