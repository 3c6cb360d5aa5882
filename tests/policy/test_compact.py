"""A document holds what is not a default, and nothing that its reader does not know."""

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evenhand_policy.compact import Loss, compact, members_of
from evenhand_policy.config import (
    Enforcement,
    Fairness,
    Gateway,
    LatencyClass,
    Limits,
    PoolReference,
    SchedulerConfig,
    TenantConfig,
)
from evenhand_policy.push_document import (
    DocumentRejectedError,
    decompress,
    encode_document,
    members_known_by,
    read_document,
    understood_members,
)

LATER = ("gateway.tenantHeaders", "prices.contextToken", "tenants.fairness")
HASH = "sha256:" + "0" * 64

OPTIONAL = sorted(
    path
    for path in understood_members()
    if path not in ("tenants.tenantId", "pool.name", "pool.namespace") and not path.startswith("serviceAccounts.")
)
"""Members without which a document can still be read."""

tenants = st.builds(
    TenantConfig,
    tenant_id=st.sampled_from(["a", "b"]),
    weight=st.sampled_from([1, 7]),
    latency_class=st.sampled_from(LatencyClass),
    fairness=st.sampled_from(Fairness),
    enforcement=st.sampled_from(Enforcement),
    limits=st.builds(
        Limits, requests_per_minute=st.sampled_from([None, 5]), max_queued_requests=st.sampled_from([None, 0])
    ),
    header_values=st.sampled_from([(), ("x",)]),
    suspended=st.booleans(),
)
configs = st.builds(
    SchedulerConfig,
    cluster=st.sampled_from(["", "c"]),
    pool=st.sampled_from([None, PoolReference(namespace="n", name="p")]),
    gateway=st.builds(Gateway, key_hashes=st.sampled_from([(), (HASH,)])),
    tenants=st.lists(tenants, max_size=3).map(tuple),
)


def read(value: Any) -> SchedulerConfig:
    return msgspec.json.decode(msgspec.json.encode(value), type=SchedulerConfig)


def test_default_config_is_an_empty_document() -> None:
    assert compact(SchedulerConfig()).value == {}


@given(configs)
def test_what_is_left_out_is_what_a_reader_takes_for_granted(config: SchedulerConfig) -> None:
    made = compact(config)
    assert read(made.value) == config
    assert made.losses == ()
    assert encode_document(config, understood_members()) == encode_document(config)


@given(configs, configs)
def test_same_digest_is_same_config(one: SchedulerConfig, other: SchedulerConfig) -> None:
    assert (encode_document(one).digest == encode_document(other).digest) == (one == other)


@given(configs, st.sets(st.sampled_from(OPTIONAL), max_size=8))
def test_reader_that_knows_less_is_told_less_and_what_is_lost_is_told(
    config: SchedulerConfig, unknown: set[str]
) -> None:
    understood = understood_members() - unknown
    value, members, losses = compact(config, understood)
    assert set(paths(value)) == members <= understood
    lost = {loss.path for loss in losses}
    assert lost <= {path.partition("=")[0] for path in unknown} | {""}
    assert (read(value) == config) == (not losses)


def paths(value: Any, above: str = "") -> list[str]:
    """Every member of a document, and what each enum is set to."""
    found = [above] if above else []
    if isinstance(value, dict):
        for name, item in value.items():
            found += paths(item, f"{above}.{name}".lstrip("."))
    elif isinstance(value, list):
        for item in value:
            found += paths(item, above)
    elif isinstance(value, LatencyClass | Fairness | Enforcement):
        found.append(f"{above}={value}")
    return found


def test_losses_name_the_tenant() -> None:
    config = SchedulerConfig(
        tenants=(
            TenantConfig(tenant_id="a"),
            TenantConfig(tenant_id="b", fairness=Fairness.PER_USER, latency_class=LatencyClass.BATCH),
        )
    )
    unknown = {"tenants.fairness", "tenants.latencyClass=Batch"}
    losses = compact(config, understood_members() - unknown).losses
    assert losses == (Loss("tenants.latencyClass", 1), Loss("tenants.fairness", 1))


def test_members_are_paths_and_values() -> None:
    members = members_of(SchedulerConfig)
    assert {"tenants", "tenants.limits.requestsPerMinute", "tenants.latencyClass=Batch", "gateway.keyHashes"} <= members
    assert understood_members() == members


def test_engine_that_says_that_it_knows_nothing_has_nothing_left_out_that_keeps_others_apart() -> None:
    """What it may lack came later; it cannot have the keys, limits and suspensions of all others left out."""
    known = members_known_by(["schemaVersion"])
    assert {"tenants.keyHashes", "tenants.suspended", "tenants.limits.requestsPerMinute"} < known
    assert {"unknownTenants.action=Reject", "gateway.keyHashes", "serviceAccounts.audience"} < known
    assert understood_members() - known == {path for path in understood_members() if path.startswith(LATER)}
    assert members_known_by(understood_members() | {"tenants.ofTheFuture"}) == understood_members()


def test_document_is_read_back_only_as_it_was_made() -> None:
    document = encode_document(SchedulerConfig(cluster="c"))
    content = decompress(document.compressed, document.digest)
    assert (read_document(content), len(content)) == (SchedulerConfig(cluster="c"), document.size)
    with pytest.raises(DocumentRejectedError):
        decompress(document.compressed, HASH)
    with pytest.raises(DocumentRejectedError):
        decompress(b"not zlib", document.digest)
    with pytest.raises(DocumentRejectedError, match="not that of its digest"):
        decompress(document.compressed + b"and more", document.digest)
