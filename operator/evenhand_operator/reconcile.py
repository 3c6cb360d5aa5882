"""From everything that was observed to what should be so. Pure: no clock, no network, no order of arrival."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from msgspec.structs import replace

from evenhand_operator.objects import ObjectKey
from evenhand_operator.observed import ObservedPolicy, ObservedPool
from evenhand_operator.secret_references import secrets_of
from evenhand_policy.compile import compile_policies
from evenhand_policy.config import (
    SchedulerConfig,
    ServiceAccountIssuer,
    UnknownTenantAction,
    UnknownTenants,
)
from evenhand_policy.errors import PolicyProblem, Reason, ResourceReference, problem_of
from evenhand_policy.membership import NamespaceLabels, pool_not_found
from evenhand_policy.pool import EnginePool, default_audience
from evenhand_policy.schema import milliseconds
from evenhand_policy.secret import API_KEYS_TYPE, Secret
from evenhand_policy.spec import TenantPolicy


@dataclass(frozen=True, slots=True)
class World:
    """What was observed, at one moment.

    Attributes:
        cluster: uid of the namespace kube-system, by which a cluster is known.
        issuer: of ServiceAccount tokens; None while it is not known.
        policies, pools: all of them.
        secrets: those that exist among those that are named.
        namespace_labels: by namespace; empty where the operator may not see namespaces.
    """

    cluster: str
    issuer: ServiceAccountIssuer | None
    policies: tuple[ObservedPolicy, ...]
    pools: tuple[ObservedPool, ...]
    secrets: Mapping[ObjectKey, Secret]
    namespace_labels: NamespaceLabels


@dataclass(frozen=True, slots=True)
class PoolPlan:
    """What one pool's engines should enforce. `is_closed`: the pool is gone, and this is the last that they are told."""

    observed: ObservedPool
    pool: EnginePool
    config: SchedulerConfig
    is_closed: bool = False


@dataclass(frozen=True, slots=True)
class Plan:
    """What should be so.

    Attributes:
        pools: by namespace and name; a pool that cannot be read has no plan.
        problems: of each policy and pool that has any, most important first.
        warnings: what works all the same, and should not stay so.
    """

    pools: Mapping[ObjectKey, PoolPlan]
    problems: Mapping[ResourceReference, tuple[PolicyProblem, ...]]
    warnings: Mapping[ResourceReference, str] = field(default_factory=dict)


def make_plan(world: World) -> Plan:
    """Compile every pool's policies. Total: whatever is wrong becomes a problem of the object that is at fault."""
    by_pool = _policies_by_pool(world.policies)
    found = [each.problem for each in (*world.policies, *world.pools) if each.problem is not None]
    plans: dict[ObjectKey, PoolPlan] = {}
    for observed in world.pools:
        policies = by_pool.pop(observed.key, [])
        if observed.pool is None:
            found += [_pool_is_invalid(policy) for policy in policies]
        else:
            plans[observed.key], problems = _plan_pool(world, observed, observed.pool, policies)
            found += problems
    found += [pool_not_found(policy) for policies in by_pool.values() for policy in policies]
    return Plan(plans, _problems_by_resource(found), dict(_warnings(world)))


def _warnings(world: World) -> Iterator[tuple[ResourceReference, str]]:
    """Secrets of another type than ours are watched with everything else in their namespace."""
    naming: list[ObservedPolicy | ObservedPool] = [*world.policies, *world.pools]
    for observed in naming:
        named = (key for key in secrets_of(observed) if key in world.secrets)
        if others := sorted(
            {name for namespace, name in named if world.secrets[namespace, name].type != API_KEYS_TYPE}
        ):
            advice = f"{', '.join(others)} should be of type {API_KEYS_TYPE}, by which the operator selects Secrets"
            yield observed.reference, advice


def _policies_by_pool(observed: Iterable[ObservedPolicy]) -> dict[ObjectKey, list[TenantPolicy]]:
    by_pool: dict[ObjectKey, list[TenantPolicy]] = defaultdict(list)
    for each in observed:
        if each.policy is not None:
            by_pool[each.policy.pool_key].append(each.policy)
    return by_pool


def _problems_by_resource(problems: Iterable[PolicyProblem]) -> dict[ResourceReference, tuple[PolicyProblem, ...]]:
    by_resource: dict[ResourceReference, list[PolicyProblem]] = defaultdict(list)
    for problem in sorted(problems, key=_importance):
        by_resource[problem.resource].append(problem)
    return {resource: tuple(found) for resource, found in by_resource.items()}


def _plan_pool(
    world: World, observed: ObservedPool, pool: EnginePool, policies: Iterable[TenantPolicy]
) -> tuple[PoolPlan, list[PolicyProblem]]:
    compiled, problems = compile_policies(policies, pool, world.secrets, namespace_labels=world.namespace_labels)
    config = replace(compiled, cluster=world.cluster, service_accounts=_issuer_for(pool, world.issuer))
    return PoolPlan(observed, pool, config), list(problems)


def close_pool(plan: PoolPlan) -> PoolPlan:
    """The plan of a pool that was deleted and is to leave nothing open: nobody is admitted any more."""
    config = SchedulerConfig(
        cluster=plan.config.cluster,
        pool=plan.config.pool,
        unknown_tenants=UnknownTenants(action=UnknownTenantAction.REJECT),
    )
    return PoolPlan(plan.observed, plan.pool, config, is_closed=True)


def _issuer_for(pool: EnginePool, issuer: ServiceAccountIssuer | None) -> ServiceAccountIssuer | None:
    """What the pool's engines take of ServiceAccount tokens: those that are meant for this pool, and not too old."""
    if issuer is None:
        return None
    tokens = pool.spec.service_account_tokens
    audience = tokens.audience or default_audience(pool.metadata.namespace, pool.metadata.name)
    return replace(issuer, audience=audience, max_age_seconds=milliseconds(tokens.max_age) // 1000)


def _pool_is_invalid(policy: TenantPolicy) -> PolicyProblem:
    namespace, name = policy.pool_key
    advice = f"EnginePool {namespace}/{name} cannot be read; its own condition Accepted says why"
    return problem_of(policy, Reason.POOL_NOT_FOUND, "spec.poolRef", advice)


_ORDER = {reason: index for index, reason in enumerate(Reason)}


def _importance(problem: PolicyProblem) -> tuple[int, str, str]:
    return _ORDER[problem.reason], problem.path, problem.message
