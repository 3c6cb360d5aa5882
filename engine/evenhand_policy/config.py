"""SchedulerConfig: the compiled document of one pool, which the operator pushes and an engine enforces.

Every default of the TenantPolicy schema is resolved here, so that an engine never needs to know the schema. How it is
sent, `evenhand_policy.push_document` says; which epoch and revision it has, and how many engines share its limits, is said
beside it. Bounds are checked where a document is decoded; what no single field can say, after that.
"""

import hashlib
from enum import StrEnum
from typing import Annotated

import msgspec
from msgspec import Meta


class LatencyClass(StrEnum):
    """When a tenant is served inside the fairness bound; never how much over time. Ordered from first to last."""

    INTERACTIVE = "Interactive"
    STANDARD = "Standard"
    BATCH = "Batch"


class Fairness(StrEnum):
    """How the requests of one tenant are ordered among themselves."""

    FIFO = "FIFO"
    PER_USER = "PerUser"
    PRIORITY = "Priority"


class Enforcement(StrEnum):
    """Whether limits refuse requests, or only count and report what they would refuse."""

    ENFORCE = "Enforce"
    AUDIT = "Audit"


class UnknownTenantAction(StrEnum):
    """What happens to a request that no TenantPolicy claims."""

    SHARE = "Share"
    REJECT = "Reject"


Natural = Annotated[int, Meta(ge=0, le=2**63 - 1)]
Positive = Annotated[int, Meta(ge=1, le=2**63 - 1)]
Weight = Annotated[int, Meta(ge=1, le=1000)]
Name = Annotated[str, Meta(min_length=1, max_length=512)]
# sha256:HEX; its characters are looked at by `read_document`
KeyHash = Annotated[str, Meta(min_length=71, max_length=71)]


class _Document(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, rename="camel", gc=False):
    """Not looked at by the cyclic garbage collector: there are tens of thousands, they live long and have no cycles."""


class PoolReference(_Document, frozen=True, kw_only=True):
    """Identity of the EnginePool that a document belongs to."""

    namespace: Name
    name: Name


class Prices(_Document, frozen=True, kw_only=True):
    """Cost of one token in units of service, before it is divided by the tenant's weight."""

    input_token: Positive = 1
    output_token: Positive = 2
    context_token: Natural = 0  # of 1,000 tokens that a computed token attends to


class UnknownTenants(_Document, frozen=True, kw_only=True):
    """The share of all requests without a policy of their own, taken together."""

    action: UnknownTenantAction = UnknownTenantAction.SHARE
    weight: Weight = 1


class Gateway(_Document, frozen=True, kw_only=True):
    """A trusted gateway: the headers count only on requests that carry one of its keys.

    `tenant_headers` is set where there are several; an engine that knows one looks at `tenant_header`, the first.
    """

    key_hashes: tuple[KeyHash, ...] = ()
    tenant_header: Name = "x-evenhand-tenant"
    tenant_headers: tuple[Name, ...] = ()

    @property
    def headers(self) -> tuple[str, ...]:
        """In which a tenant is named, the first that a request has."""
        return self.tenant_headers or (self.tenant_header,)


class ServiceAccountIssuer(_Document, frozen=True, kw_only=True):
    """What an engine needs to verify Kubernetes ServiceAccount tokens offline. `jwks` is an RFC 7517 key set.

    A token that was issued more than `max_age_seconds` ago is not taken; None: however old.
    """

    issuer: Name
    audience: Name
    jwks: dict[str, list[dict[str, str | list[str]]]]
    max_age_seconds: Positive | None = None


class Slo(_Document, frozen=True, kw_only=True):
    """Latency objectives in milliseconds; None: no objective."""

    time_to_first_token_ms: Positive | None = None
    inter_token_latency_ms: Positive | None = None


class Limits(_Document, frozen=True, kw_only=True):
    """Limits of one tenant over the whole pool; None: unlimited."""

    requests_per_minute: Positive | None = None
    tokens_per_minute: Positive | None = None
    max_concurrent_requests: Positive | None = None
    max_queued_requests: Natural | None = None
    max_prompt_tokens: Positive | None = None
    max_output_tokens: Positive | None = None
    queue_timeout_ms: Positive | None = None


class KvCacheShare(_Document, frozen=True, kw_only=True):
    """Share of an engine's KV blocks: guaranteed (lent while unused) and at most, in percent."""

    guaranteed_percent: Annotated[int, Meta(ge=0, le=100)] = 0
    max_percent: Annotated[int, Meta(ge=1, le=100)] = 100
    prefix_sharing_group: Name | None = None


class TenantConfig(_Document, frozen=True, kw_only=True):
    """One tenant, defaults resolved. `weight` is relative; `generation` is that of the TenantPolicy it comes from."""

    tenant_id: Name
    uid: str = ""
    generation: Natural = 0
    weight: Weight = 1
    latency_class: LatencyClass = LatencyClass.STANDARD
    slo: Slo = Slo()
    key_hashes: tuple[KeyHash, ...] = ()
    # system:serviceaccount:NAMESPACE:NAME[#UID], or system:serviceaccounts:NAMESPACE
    service_accounts: tuple[Name, ...] = ()
    header_values: tuple[Name, ...] = ()
    limits: Limits = Limits()
    kv_cache: KvCacheShare = KvCacheShare()
    fairness: Fairness = Fairness.FIFO
    enforcement: Enforcement = Enforcement.ENFORCE
    suspended: bool = False


class SchedulerConfig(_Document, frozen=True, kw_only=True):
    """Everything that one pool's engines enforce. `tenants` is sorted by tenant id."""

    schema_version: int = 1
    cluster: str = ""
    pool: PoolReference | None = None
    prices: Prices = Prices()
    unknown_tenants: UnknownTenants = UnknownTenants()
    gateway: Gateway = Gateway()
    service_accounts: ServiceAccountIssuer | None = None
    tenants: tuple[TenantConfig, ...] = ()

    def canonical_json(self) -> bytes:
        """One byte representation of all of it: sorted keys, no white space."""
        return msgspec.json.encode(self, order="sorted")

    def digest(self) -> str:
        """`sha256:` and the hexadecimal SHA-256 of `canonical_json`."""
        return "sha256:" + hashlib.sha256(self.canonical_json()).hexdigest()


DEFAULT_TENANT_ID = "default"
"""Tenant of every request that no policy claims: all of them share one account and one weight."""
