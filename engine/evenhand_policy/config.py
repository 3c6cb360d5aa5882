"""SchedulerConfig: the compiled document of one pool, which the operator pushes and an engine enforces.

Every default of the TenantPolicy schema is resolved here, so that an engine never needs to know the schema. The
document is canonical JSON (keys in camel case, sorted) and its digest is the SHA-256 of that.
"""

import hashlib
from enum import StrEnum

import msgspec


class LatencyClass(StrEnum):
    """When a tenant is served inside the fairness bound; never how much over time. Ordered from first to last."""

    INTERACTIVE = "Interactive"
    STANDARD = "Standard"
    BATCH = "Batch"


class Fairness(StrEnum):
    """How the requests of one tenant are ordered among themselves."""

    FIFO = "FIFO"
    PER_USER = "PerUser"


class Enforcement(StrEnum):
    """Whether limits refuse requests, or only count and report what they would refuse."""

    ENFORCE = "Enforce"
    AUDIT = "Audit"


class UnknownTenantAction(StrEnum):
    """What happens to a request that no TenantPolicy claims."""

    SHARE = "Share"
    REJECT = "Reject"


class _Document(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, rename="camel"):
    pass


class PoolReference(_Document, frozen=True, kw_only=True):
    """Identity of the EnginePool that a document belongs to."""

    namespace: str
    name: str


class Prices(_Document, frozen=True, kw_only=True):
    """Cost of one token in units of service, before it is divided by the tenant's weight."""

    input_token: int = 1
    output_token: int = 2


class UnknownTenants(_Document, frozen=True, kw_only=True):
    """The share of all requests without a policy of their own, taken together."""

    action: UnknownTenantAction = UnknownTenantAction.SHARE
    weight: int = 1


class Gateway(_Document, frozen=True, kw_only=True):
    """A trusted gateway: `tenant_header` counts only on requests that carry one of its keys."""

    key_hashes: tuple[str, ...] = ()
    tenant_header: str = "x-evenhand-tenant"


class ServiceAccountIssuer(_Document, frozen=True, kw_only=True):
    """What an engine needs to verify Kubernetes ServiceAccount tokens offline. `jwks` is an RFC 7517 key set."""

    issuer: str
    audience: str
    jwks: dict[str, list[dict[str, str | list[str]]]]


class Slo(_Document, frozen=True, kw_only=True):
    """Latency objectives in milliseconds; None: no objective."""

    time_to_first_token_ms: int | None = None
    inter_token_latency_ms: int | None = None


class Limits(_Document, frozen=True, kw_only=True):
    """Limits of one tenant over the whole pool; None: unlimited."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    max_concurrent_requests: int | None = None
    max_queued_requests: int | None = None
    max_prompt_tokens: int | None = None
    max_output_tokens: int | None = None
    queue_timeout_ms: int | None = None


class KvCacheShare(_Document, frozen=True, kw_only=True):
    """Share of an engine's KV blocks: guaranteed (lent while unused) and at most, in percent."""

    guaranteed_percent: int = 0
    max_percent: int = 100
    prefix_sharing_group: str | None = None


class TenantConfig(_Document, frozen=True, kw_only=True):
    """One tenant, defaults resolved. `weight` is relative; `generation` is that of the TenantPolicy it comes from."""

    tenant_id: str
    uid: str = ""
    generation: int = 0
    weight: int = 1
    latency_class: LatencyClass = LatencyClass.STANDARD
    slo: Slo = Slo()
    key_hashes: tuple[str, ...] = ()
    service_accounts: tuple[str, ...] = ()
    header_values: tuple[str, ...] = ()
    limits: Limits = Limits()
    kv_cache: KvCacheShare = KvCacheShare()
    fairness: Fairness = Fairness.FIFO
    enforcement: Enforcement = Enforcement.ENFORCE
    suspended: bool = False


class SchedulerConfig(_Document, frozen=True, kw_only=True):
    """Everything that one pool's engines enforce. `tenants` is sorted by tenant id.

    `(epoch, revision)` grows with every change; the number of replicas travels beside the document, never in it.
    """

    schema_version: int = 1
    cluster: str = ""
    pool: PoolReference | None = None
    epoch: int = 0
    revision: int = 0
    prices: Prices = Prices()
    unknown_tenants: UnknownTenants = UnknownTenants()
    gateway: Gateway = Gateway()
    service_accounts: ServiceAccountIssuer | None = None
    tenants: tuple[TenantConfig, ...] = ()

    def canonical_json(self) -> bytes:
        """The document's one byte representation: sorted keys, no white space."""
        return msgspec.json.encode(self, order="sorted")

    def digest(self) -> str:
        """`sha256:` and the hexadecimal SHA-256 of `canonical_json`."""
        return "sha256:" + hashlib.sha256(self.canonical_json()).hexdigest()


DEFAULT_TENANT_ID = "default"
"""Tenant of every request that no policy claims: all of them share one account and one weight."""
