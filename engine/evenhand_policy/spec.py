"""TenantPolicy: who a tenant is and what it is entitled to, exactly as users write it.

Each field's description, bounds and default are what `kubectl explain` shows and what the API server enforces.
"""

from typing import Annotated, Any, ClassVar, Literal

from msgspec import Meta

from evenhand_policy.config import DEFAULT_TENANT_ID, Enforcement, Fairness, LatencyClass
from evenhand_policy.identity_spec import Identity
from evenhand_policy.schema import NEWER_IGNORED, DnsLabel, DnsName, Duration, Metadata, Model, Rule, within


class PoolRef(Model, frozen=True, kw_only=True):
    """The EnginePool that a policy belongs to."""

    name: Annotated[DnsName, Meta(description="Name of the EnginePool.")] = "default"
    namespace: Annotated[
        DnsLabel | None,
        Meta(
            description="Namespace of the EnginePool; the policy's own where not set. Another one works only if the "
            "pool's allowedNamespaces admit the policy's namespace."
        ),
    ] = None


class SloSpec(Model, frozen=True, kw_only=True):
    """Latency objectives. They order work inside the fairness bound and size the steps; they buy no larger share."""

    time_to_first_token: Annotated[
        Duration | None,
        Meta(description="Objective from a request's arrival to its first token, 1ms to 1h, such as 500ms."),
    ] = None
    inter_token_latency: Annotated[
        Duration | None,
        Meta(
            description="Objective between two tokens of a stream, 1ms to 1m, such as 50ms. While the tenant streams, "
            "steps are planned to take no longer: prompts get shorter chunks, and streams of tenants that are ahead of it "
            "by service take turns. It takes nothing from another's share, and binds no prompts where streams alone miss it."
        ),
    ] = None

    rules: ClassVar[tuple[Rule, ...]] = (
        within("timeToFirstToken", "time_to_first_token", "1ms", "1h"),
        within("interTokenLatency", "inter_token_latency", "1ms", "1m"),
    )


Requests = Annotated[int, Meta(ge=1, le=1_000_000)]
Tokens = Annotated[int, Meta(ge=1, le=10_000_000)]


class LimitsSpec(Model, frozen=True, kw_only=True):
    """Limits of the tenant over all engines of the pool together. A limit that is not set does not exist."""

    requests_per_minute: Annotated[Requests | None, Meta(description="Most requests per minute (token bucket).")] = None
    tokens_per_minute: Annotated[
        Annotated[int, Meta(ge=1, le=1_000_000_000_000)] | None,
        Meta(
            description="Most tokens per minute, prompt and output together (token bucket). A request reserves its "
            "prompt and its largest output on arrival and gets back what it did not use."
        ),
    ] = None
    max_concurrent_requests: Annotated[
        Requests | None, Meta(description="Most requests that run at once; further ones wait in the queue.")
    ] = None
    max_queued_requests: Annotated[
        Annotated[int, Meta(ge=0, le=1_000_000)] | None,
        Meta(description="Most requests that wait; a further one is refused with queue_full."),
    ] = None
    max_prompt_tokens: Annotated[
        Tokens | None, Meta(description="Longest prompt, in tokens; a longer one is refused.")
    ] = None
    max_output_tokens: Annotated[
        Tokens | None,
        Meta(description="Largest output that a request may ask for, in tokens, and what it gets if it asks for none."),
    ] = None
    queue_timeout: Annotated[
        Duration | None,
        Meta(
            description="Longest wait for a first scheduling, 1ms to 24h, such as 60s; then the request is refused "
            "with queue_timeout."
        ),
    ] = None

    rules: ClassVar[tuple[Rule, ...]] = (
        within("queueTimeout", "queue_timeout", "1ms", "24h"),
        Rule(
            "maxPromptTokens and maxOutputTokens together must not exceed tokensPerMinute: "
            "the largest request that they permit could never be admitted",
            "!has(self.tokensPerMinute) || (has(self.maxPromptTokens) ? self.maxPromptTokens : 0) + "
            "(has(self.maxOutputTokens) ? self.maxOutputTokens : 0) <= self.tokensPerMinute",
            lambda limits: (
                limits.tokens_per_minute is None
                or (limits.max_prompt_tokens or 0) + (limits.max_output_tokens or 0) <= limits.tokens_per_minute
            ),
        ),
    )


class KvCacheSpec(Model, frozen=True, kw_only=True):
    """The tenant's part of each engine's KV cache."""

    guaranteed_percent: Annotated[
        int,
        Meta(
            ge=0,
            le=100,
            description="Percent of the blocks that the tenant can always have; lent to others while it does not use "
            "them. The guarantees of a pool may not exceed 100 together.",
        ),
    ] = 0
    max_percent: Annotated[
        int, Meta(ge=1, le=100, description="Percent of the blocks that the tenant may hold at most.")
    ] = 100
    prefix_sharing_group: Annotated[
        DnsLabel | None,
        Meta(
            description="Policies of one namespace that name the same group reuse each other's cached prefixes, and so "
            "can tell by timing what the others sent. Not set: nobody else's."
        ),
    ] = None

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "guaranteedPercent must not exceed maxPercent",
            "self.guaranteedPercent <= self.maxPercent",
            lambda kv_cache: kv_cache.guaranteed_percent <= kv_cache.max_percent,
        ),
    )


def _has_unique_identity_names(spec: "TenantPolicySpec") -> bool:
    return len({identity.name for identity in spec.identities}) == len(spec.identities)


class TenantPolicySpec(Model, frozen=True, kw_only=True):
    """Who a tenant is and what it is entitled to."""

    pool_ref: Annotated[PoolRef, Meta(description="The EnginePool whose engines enforce this policy.")] = PoolRef()
    tenant: Annotated[
        DnsName | None,
        Meta(
            description="The tenant's name in the pool, in metrics and in accounts; metadata.name where not set. "
            "Immutable: to change it, delete the policy and create a new one."
        ),
    ] = None
    weight: Annotated[
        int,
        Meta(
            ge=1,
            le=1000,
            description="Relative share: while both have work waiting, weight 4 gets four times the service of weight "
            "1.",
        ),
    ] = 1
    latency_class: Annotated[
        LatencyClass,
        Meta(
            description="Who goes first among equally entitled tenants: Interactive, then Standard, then Batch. It "
            "decides when the tenant is served inside the fairness bound, never how much over time.",
            extra=NEWER_IGNORED,
        ),
    ] = LatencyClass.STANDARD
    slo: Annotated[SloSpec | None, Meta(description="Latency objectives.")] = None
    identities: Annotated[
        tuple[Identity, ...],
        Meta(
            max_length=16,
            description="How a request proves that it is this tenant's. Without any, nobody can use the policy.",
            extra_json_schema={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["name"]},
            extra=NEWER_IGNORED,
        ),
    ] = ()
    limits: Annotated[LimitsSpec | None, Meta(description="Limits over all engines of the pool together.")] = None
    kv_cache: Annotated[KvCacheSpec | None, Meta(description="Guarantee and ceiling in each engine's KV cache.")] = None
    fairness: Annotated[
        Fairness,
        Meta(
            description="Order of the tenant's own requests. FIFO: by arrival. PerUser: fair between the values of the "
            "request field user. Priority: by the request field priority, the lowest first, as in vLLM.",
            extra=NEWER_IGNORED,
        ),
    ] = Fairness.FIFO
    enforcement: Annotated[
        Enforcement,
        Meta(
            description="Enforce the limits, or Audit: count and report what would be refused, and refuse nothing.",
            extra=NEWER_IGNORED,
        ),
    ] = Enforcement.ENFORCE
    suspend: Annotated[
        bool,
        Meta(
            description="Refuse the tenant's requests with tenant_suspended. What is running is served to its end, "
            "what is queued is refused."
        ),
    ] = False

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule("every name in identities must be unique", "", _has_unique_identity_names),
        Rule(
            "tenant is immutable, and may be neither added nor removed: delete the policy and create a new one",
            "has(self.tenant) == has(oldSelf.tenant) && (!has(self.tenant) || self.tenant == oldSelf.tenant)",
            None,
        ),
    )


class TenantPolicy(Model, frozen=True, kw_only=True):
    """A tenant of an EnginePool: who it is, its weight, latency class and objectives, limits, and KV cache share."""

    api_version: Literal["evenhand.dev/v1alpha1"]
    kind: Literal["TenantPolicy"]
    metadata: Metadata
    spec: Annotated[TenantPolicySpec, Meta(description="What the tenant is entitled to.")]
    status: dict[str, Any] | None = None

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            f"the tenant name {DEFAULT_TENANT_ID} is that of all requests without a policy: choose another name, or "
            "set unknownTenants of the EnginePool",
            f"(has(self.spec.tenant) ? self.spec.tenant : self.metadata.name) != '{DEFAULT_TENANT_ID}'",
            lambda policy: policy.tenant_id != DEFAULT_TENANT_ID,
        ),
    )

    @property
    def tenant_id(self) -> str:
        """Name of the tenant in its pool."""
        return self.spec.tenant or self.metadata.name

    @property
    def pool_key(self) -> tuple[str, str]:
        """Namespace and name of the EnginePool that the policy belongs to."""
        return self.spec.pool_ref.namespace or self.metadata.namespace, self.spec.pool_ref.name
