"""compile_policies: all policies of a pool into the one document that its engines enforce.

Pure, total and independent of the order of its input: a policy that cannot be compiled is left out and becomes a
problem, the others still compile. Where two policies claim the same thing, the older one has it; a policy that is left
out claims nothing.
"""

from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import NamedTuple

import msgspec

from evenhand_policy.config import Gateway, PoolReference, Prices, SchedulerConfig, TenantConfig, UnknownTenants
from evenhand_policy.errors import PolicyProblem, Reason, ResourceReference, problem_of, reference
from evenhand_policy.identities import Claim, ClaimKind, ObjectKey, read_claims, read_keys
from evenhand_policy.pool import EnginePool, NamespacesFrom
from evenhand_policy.resolve import resolve_tenant
from evenhand_policy.secret import Secret
from evenhand_policy.spec import TenantPolicy

NamespaceLabels = Mapping[str, Mapping[str, str]]
"""Labels of each namespace."""

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
        namespace_labels: a pool that selects namespaces needs them.

    Returns:
        The config with epoch and revision 0, which are the caller's to set, and the problems of policies and pool.
    """
    ledger = _Ledger()
    gateway, problems = _compile_gateway(pool, secrets, ledger)
    tenants: list[TenantConfig] = []
    for policy in sorted(policies, key=_age):
        claims, found = read_claims(policy, secrets)
        if pool is not None:
            found += _check_admission(policy, pool, namespace_labels)
        if not found:
            found += ledger.claim(policy, claims)
        if not found:
            tenants.append(resolve_tenant(policy, claims))
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


def pool_not_found(policy: TenantPolicy) -> PolicyProblem:
    """The problem of a policy that refers to a pool which does not exist."""
    namespace, name = policy.pool_key
    advice = f"there is no EnginePool {namespace}/{name}; correct the reference or create the pool"
    return problem_of(policy, Reason.POOL_NOT_FOUND, "spec.poolRef", advice)


def _age(policy: TenantPolicy) -> tuple[str, str, str, bytes]:
    """Oldest first, then by namespace and name; an object without a creation time (from a file) is the youngest."""
    metadata = policy.metadata
    return metadata.creation_timestamp or "~", metadata.namespace, metadata.name, msgspec.json.encode(policy)


class _Ledger:
    """Who has claimed what, filled from the oldest policy to the youngest."""

    def __init__(self) -> None:
        self._claimants: dict[tuple[ClaimKind, str], ResourceReference] = {}
        self._guaranteed_percent = 0

    def claim(self, policy: TenantPolicy, claims: list[Claim]) -> list[PolicyProblem]:
        """Book everything for the policy, or nothing and return what is in the way."""
        guarantee = policy.spec.kv_cache.guaranteed_percent if policy.spec.kv_cache else 0
        problems = list(self._conflicts(policy, claims, guarantee))
        if not problems:
            self.book(reference(policy), claims)
            self._guaranteed_percent += guarantee
        return problems

    def book(self, claimant: ResourceReference, claims: Iterable[Claim]) -> None:
        self._claimants.update(((claim.kind, claim.value), claimant) for claim in claims)

    def _conflicts(self, policy: TenantPolicy, claims: Iterable[Claim], guarantee: int) -> Iterator[PolicyProblem]:
        for claim in claims:
            if claimant := self._claimants.get((claim.kind, claim.value)):
                advice = f"{claim.what} is already claimed by {claimant}; change or delete one of the two"
                yield problem_of(policy, claim.conflict, claim.path, advice, claimant)
        left = 100 - self._guaranteed_percent
        if guarantee > left:
            advice = f"{guarantee} percent are more than the {left} that the pool's other guarantees leave; lower one"
            yield problem_of(policy, Reason.GUARANTEE_OVERCOMMITTED, "spec.kvCache.guaranteedPercent", advice)


def _check_admission(policy: TenantPolicy, pool: EnginePool, namespace_labels: NamespaceLabels) -> list[PolicyProblem]:
    """Whether the policy is the pool's, and what it may claim there."""
    home = pool.metadata.namespace
    namespace = policy.metadata.namespace
    if policy.pool_key != (home, pool.metadata.name):
        return [pool_not_found(policy)]
    if namespace == home:
        return []
    if not _admits(pool, namespace, namespace_labels.get(namespace, {})):
        advice = f"{reference(pool)} admits no policies of namespace {namespace}; its allowedNamespaces decide"
        return [problem_of(policy, Reason.NOT_ALLOWED, "spec.poolRef", advice)]
    return list(_foreign_service_accounts(policy))


def _admits(pool: EnginePool, namespace: str, labels: Mapping[str, str]) -> bool:
    allowed = pool.spec.allowed_namespaces
    if allowed.from_ is NamespacesFrom.ALL:
        return True
    known = {**labels, "kubernetes.io/metadata.name": namespace}
    return allowed.selector is not None and allowed.selector.matches(known)


def _foreign_service_accounts(policy: TenantPolicy) -> Iterator[PolicyProblem]:
    """A guest of a pool may not take over the traffic of another namespace's ServiceAccount."""
    own = policy.metadata.namespace
    for index, identity in enumerate(policy.spec.identities):
        account = identity.service_account
        if account is not None and account.namespace not in (None, own):
            path = f"spec.identities[{index}].serviceAccount.namespace"
            advice = f"a policy outside the pool's namespace may claim ServiceAccounts of its own namespace {own} only"
            yield problem_of(policy, Reason.NOT_ALLOWED, path, advice)


def _compile_gateway(
    pool: EnginePool | None, secrets: Mapping[ObjectKey, Secret], ledger: _Ledger
) -> tuple[Gateway, list[PolicyProblem]]:
    """The gateway, whose keys are booked before any policy's; without keys (it is not believed) if its Secret is wrong."""
    if pool is None or pool.spec.gateway is None:
        return Gateway(), []
    spec = pool.spec.gateway
    keys, problems = read_keys(pool, spec.api_keys.secret_ref.name, "spec.gateway.apiKeys.secretRef.name", secrets)
    if problems:
        return Gateway(tenant_header=spec.tenant_header), problems
    ledger.book(reference(pool), keys)
    return Gateway(key_hashes=tuple(sorted({key.value for key in keys})), tenant_header=spec.tenant_header), []


def _compile_prices(pool: EnginePool | None) -> Prices:
    if pool is None:
        return Prices()
    return Prices(input_token=pool.spec.prices.input_token, output_token=pool.spec.prices.output_token)


def _compile_unknown_tenants(pool: EnginePool | None) -> UnknownTenants:
    if pool is None:
        return UnknownTenants()
    return UnknownTenants(action=pool.spec.unknown_tenants.action, weight=pool.spec.unknown_tenants.weight)
