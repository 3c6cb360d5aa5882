"""compile_policies: all policies of a pool into the one document that its engines enforce.

Pure, total and independent of the order of its input: a policy that cannot be compiled is left out and becomes a
problem, the others still compile. Where two policies claim the same thing, the older one has it; a policy that is left
out claims nothing.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import NamedTuple

import msgspec
from msgspec.structs import replace

from evenhand_policy.config import Gateway, PoolReference, Prices, SchedulerConfig, TenantConfig, UnknownTenants
from evenhand_policy.errors import PolicyProblem, Reason, ResourceReference, problem_of, reference
from evenhand_policy.grants import Grant
from evenhand_policy.identities import Claim, ClaimKind, ObjectKey, read_claims, read_keys
from evenhand_policy.membership import NamespaceLabels, admit, exceeds_grant
from evenhand_policy.pool import EnginePool
from evenhand_policy.resolve import resolve_limits, resolve_tenant
from evenhand_policy.secret import Secret
from evenhand_policy.spec import LimitsSpec, TenantPolicy

_NO_LABELS: NamespaceLabels = MappingProxyType({})


class Compilation(NamedTuple):
    """What came of the policies: `config` holds those without a problem, `problems` is sorted by object and path."""

    config: SchedulerConfig
    problems: tuple[PolicyProblem, ...]


def compile_policies(
    policies: Iterable[TenantPolicy],
    pool: EnginePool | None,
    secrets: Mapping[ObjectKey, Secret],
    *,
    namespace_labels: NamespaceLabels = _NO_LABELS,
) -> Compilation:
    """Compile the policies of one pool.

    Args:
        policies: in any order. One that refers to another pool gets `PoolNotFound`.
        pool: None (policy files): defaults for everything, and policies may refer to whatever they like.
        secrets: those that the policies and the pool name; others are ignored.
        namespace_labels: a pool that selects namespaces needs them; one that is missing matches no selector.

    Returns:
        The config, and the problems of policies and pool.
    """
    ledger = _Ledger(pool)
    gateway, problems = _compile_gateway(pool, secrets, ledger)
    tenants: list[TenantConfig] = []
    for policy in sorted(policies, key=_age):
        admission = admit(policy, pool, namespace_labels)
        claims, found = read_claims(policy, admission.tenant_id, secrets)
        limits, contradictions = _resolve_limits(policy, pool)
        found += [*admission.problems, *contradictions]
        if not found:
            found += ledger.claim(policy, claims, admission.grant)
        if not found:
            tenants.append(resolve_tenant(policy, admission.tenant_id, claims, limits))
        problems += found
    config = SchedulerConfig(
        pool=PoolReference(namespace=pool.metadata.namespace, name=pool.metadata.name) if pool else None,
        prices=_compile_prices(pool),
        unknown_tenants=_compile_unknown_tenants(pool),
        gateway=gateway,
        tenants=tuple(sorted(tenants, key=lambda tenant: tenant.tenant_id)),
    )
    problems.sort(key=lambda problem: (problem.resource, problem.path, problem.reason, problem.message))
    return Compilation(config, tuple(problems))


def _age(policy: TenantPolicy) -> tuple[str, str, str, bytes]:
    """Oldest first, then by namespace and name; an object without a creation time (from a file) is the youngest."""
    metadata = policy.metadata
    return metadata.creation_timestamp or "~", metadata.namespace, metadata.name, msgspec.json.encode(policy)


class _Ledger:
    """Who has claimed what in a pool, filled from the oldest policy to the youngest."""

    def __init__(self, pool: EnginePool | None) -> None:
        self._pool = pool
        self._claimants: dict[tuple[ClaimKind, str], ResourceReference] = {}
        self._guaranteed_percents: Counter[str] = Counter()  # by namespace
        self._weights: Counter[str] = Counter()  # by namespace

    def claim(self, policy: TenantPolicy, claims: list[Claim], grant: Grant | None) -> list[PolicyProblem]:
        """Book everything for the policy, or nothing and return what is in the way.

        `grant` bounds what the policies of its namespace claim together; None: nothing does.
        """
        guarantee = policy.spec.kv_cache.guaranteed_percent if policy.spec.kv_cache else 0
        problems = [*self._conflicts(policy, claims), *self._shortages(policy, guarantee, grant)]
        if not problems:
            self.book(reference(policy), claims)
            self._guaranteed_percents[policy.metadata.namespace] += guarantee
            self._weights[policy.metadata.namespace] += policy.spec.weight
        return problems

    def book(self, claimant: ResourceReference, claims: Iterable[Claim]) -> None:
        self._claimants.update(((claim.kind, claim.value), claimant) for claim in claims)

    def _conflicts(self, policy: TenantPolicy, claims: Iterable[Claim]) -> Iterator[PolicyProblem]:
        for claim in claims:
            if claimant := self._claimants.get((claim.kind, claim.value)):
                advice = f"{claim.what} is already claimed by {claimant}; change or delete one of the two"
                yield problem_of(policy, claim.conflict, claim.path, advice, claimant)

    def _shortages(self, policy: TenantPolicy, guarantee: int, grant: Grant | None) -> Iterator[PolicyProblem]:
        """What is left of the guarantees of the pool, and of what a guest's namespace is granted."""
        namespace, path = policy.metadata.namespace, "spec.kvCache.guaranteedPercent"
        if grant is not None and self._pool is not None:
            percent, weight = (
                self._guaranteed_percents[namespace] + guarantee,
                self._weights[namespace] + policy.spec.weight,
            )
            if guarantee and percent > grant.max_guaranteed_percent:
                excess = f"with this policy guarantees of {percent} percent are above the maxGuaranteedPercent of"
                yield exceeds_grant(policy, self._pool, path, f"{excess} {grant.max_guaranteed_percent}")
            if weight > grant.total_weight:
                excess = f"with this policy a total weight of {weight} is above the maxTotalWeight of"
                yield exceeds_grant(policy, self._pool, "spec.weight", f"{excess} {grant.total_weight}")
        left = 100 - self._guaranteed_percents.total()
        if guarantee > left:
            advice = f"{guarantee} percent are more than the {left} that the pool's other guarantees leave; lower one"
            yield problem_of(policy, Reason.GUARANTEE_OVERCOMMITTED, path, advice)


def _resolve_limits(policy: TenantPolicy, pool: EnginePool | None) -> tuple[LimitsSpec, list[PolicyProblem]]:
    """The limits that hold, the pool's defaults included."""
    defaults = pool.spec.defaults.limits if pool is not None and pool.spec.defaults is not None else None
    try:
        return resolve_limits(policy.spec.limits, defaults), []
    except ValueError as error:
        advice = f"with the default limits of the pool: {error}; set both in the policy"
        return LimitsSpec(), [problem_of(policy, Reason.INVALID, "spec.limits", advice)]


def _compile_gateway(
    pool: EnginePool | None, secrets: Mapping[ObjectKey, Secret], ledger: _Ledger
) -> tuple[Gateway, list[PolicyProblem]]:
    """The gateway, whose keys are booked before any policy's; without keys (it is not believed) if its Secret is wrong."""
    if pool is None or pool.spec.gateway is None:
        return Gateway(), []
    spec = pool.spec.gateway
    gateway = Gateway(tenant_header=spec.headers[0], tenant_headers=spec.headers if len(spec.headers) > 1 else ())
    keys, problems = read_keys(pool, spec.api_keys.secret_ref.name, "spec.gateway.apiKeys.secretRef.name", secrets)
    if problems:
        return gateway, problems
    ledger.book(reference(pool), keys)
    return replace(gateway, key_hashes=tuple(sorted({key.value for key in keys}))), []


def _compile_prices(pool: EnginePool | None) -> Prices:
    if pool is None:
        return Prices()
    prices = pool.spec.prices
    return Prices(input_token=prices.input_token, output_token=prices.output_token, context_token=prices.context_token)


def _compile_unknown_tenants(pool: EnginePool | None) -> UnknownTenants:
    if pool is None:
        return UnknownTenants()
    return UnknownTenants(action=pool.spec.unknown_tenants.action, weight=pool.spec.unknown_tenants.weight)
