"""From an accepted TenantPolicy to the TenantConfig that engines enforce: defaults and units resolved."""

from collections.abc import Sequence

from msgspec.structs import asdict

from evenhand_policy.config import KvCacheShare, Limits, Slo, TenantConfig
from evenhand_policy.credentials import bound_account
from evenhand_policy.identities import Claim, ClaimKind
from evenhand_policy.schema import milliseconds
from evenhand_policy.spec import KvCacheSpec, LimitsSpec, SloSpec, TenantPolicy


def resolve_limits(own: LimitsSpec | None, defaults: LimitsSpec | None) -> LimitsSpec:
    """The policy's limits, and the pool's where it has none.

    Raises:
        ValueError: each is sound, but not both together; the message is that of the rule.
    """
    if own is None or defaults is None:
        return own or defaults or LimitsSpec()
    given = {name: value for name, value in asdict(own).items() if value is not None}
    return LimitsSpec(**(asdict(defaults) | given))


def resolve_tenant(policy: TenantPolicy, tenant_id: str, claims: Sequence[Claim], limits: LimitsSpec) -> TenantConfig:
    """The tenant of a policy whose claims nobody contests."""
    spec = policy.spec
    return TenantConfig(
        tenant_id=tenant_id,
        uid=policy.metadata.uid,
        generation=policy.metadata.generation,
        weight=spec.weight,
        latency_class=spec.latency_class,
        slo=_resolve_slo(spec.slo or SloSpec()),
        key_hashes=_claimed(claims, ClaimKind.KEY_HASH),
        service_accounts=_claimed(claims, ClaimKind.SERVICE_ACCOUNT),
        header_values=_claimed(claims, ClaimKind.HEADER_VALUE),
        limits=_limits_in_milliseconds(limits),
        kv_cache=_resolve_kv_cache(spec.kv_cache or KvCacheSpec(), policy.metadata.namespace),
        fairness=spec.fairness,
        enforcement=spec.enforcement,
        suspended=spec.suspend,
    )


def _claimed(claims: Sequence[Claim], kind: ClaimKind) -> tuple[str, ...]:
    return tuple(sorted({bound_account(claim.value, claim.uid) for claim in claims if claim.kind is kind}))


def _resolve_slo(slo: SloSpec) -> Slo:
    return Slo(
        time_to_first_token_ms=_optional_milliseconds(slo.time_to_first_token),
        inter_token_latency_ms=_optional_milliseconds(slo.inter_token_latency),
    )


def _limits_in_milliseconds(limits: LimitsSpec) -> Limits:
    return Limits(
        requests_per_minute=limits.requests_per_minute,
        tokens_per_minute=limits.tokens_per_minute,
        max_concurrent_requests=limits.max_concurrent_requests,
        max_queued_requests=limits.max_queued_requests,
        max_prompt_tokens=limits.max_prompt_tokens,
        max_output_tokens=limits.max_output_tokens,
        queue_timeout_ms=_optional_milliseconds(limits.queue_timeout),
    )


def _resolve_kv_cache(kv_cache: KvCacheSpec, namespace: str) -> KvCacheShare:
    group = kv_cache.prefix_sharing_group
    return KvCacheShare(
        guaranteed_percent=kv_cache.guaranteed_percent,
        max_percent=kv_cache.max_percent,
        prefix_sharing_group=None if group is None else f"{namespace}/{group}",
    )


def _optional_milliseconds(duration: str | None) -> int | None:
    return None if duration is None else milliseconds(duration)
