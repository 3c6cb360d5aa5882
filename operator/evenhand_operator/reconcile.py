"""From everything that was observed to what should be so. Pure: no clock, no network, no order of arrival."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from msgspec.structs import replace

from evenhand_operator.objects import EnginePod, ObjectKey
from evenhand_operator.observed import ObservedPolicy, ObservedPool
from evenhand_policy.admission import NamespaceLabels, pool_not_found
from evenhand_policy.compile import compile_policies
from evenhand_policy.config import SchedulerConfig, ServiceAccountIssuer
from evenhand_policy.credentials import MIN_KEY_CHARACTERS
from evenhand_policy.errors import PolicyProblem, Reason, ResourceReference, problem_of
from evenhand_policy.pool import EnginePool
from evenhand_policy.push_protocol import PushKeys, read_push_keys
from evenhand_policy.secret import Secret
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
    """What one pool's engines should enforce. `config` has neither epoch nor revision: those are the leader's."""

    observed: ObservedPool
    pool: EnginePool
    config: SchedulerConfig
    keys: PushKeys


@dataclass(frozen=True, slots=True)
class Plan:
    """What should be so.

    Attributes:
        pools: by namespace and name; a pool that cannot be read has no plan.
        problems: of each policy and pool that has any, most important first.
    """

    pools: Mapping[ObjectKey, PoolPlan]
    problems: Mapping[ResourceReference, tuple[PolicyProblem, ...]]


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
    return Plan(plans, _problems_by_resource(found))


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
    config = replace(compiled, cluster=world.cluster, service_accounts=world.issuer)
    secret = world.secrets.get((observed.key[0], pool.spec.push_key.secret_ref.name))
    keys = read_push_keys(secret.values()) if secret is not None else ()
    return PoolPlan(observed, pool, config, keys), [*problems, *_push_key_problems(pool, secret, keys)]


def _push_key_problems(pool: EnginePool, secret: Secret | None, keys: PushKeys) -> list[PolicyProblem]:
    path, name = "spec.pushKey.secretRef.name", pool.spec.push_key.secret_ref.name
    if secret is None:
        advice = f"there is no Secret {name}; create it with a random value and mount it in the engine pods"
        return [problem_of(pool, Reason.SECRET_NOT_FOUND, path, advice)]
    if not keys:
        advice = f"Secret {name} holds no key of at least {MIN_KEY_CHARACTERS} characters; nothing can be pushed"
        return [problem_of(pool, Reason.WEAK_KEY, path, advice)]
    return []


def _pool_is_invalid(policy: TenantPolicy) -> PolicyProblem:
    namespace, name = policy.pool_key
    advice = f"EnginePool {namespace}/{name} cannot be read; its own condition Accepted says why"
    return problem_of(policy, Reason.POOL_NOT_FOUND, "spec.poolRef", advice)


_ORDER = {reason: index for index, reason in enumerate(Reason)}


def _importance(problem: PolicyProblem) -> tuple[int, str, str]:
    return _ORDER[problem.reason], problem.path, problem.message


def ready_pods(pool: EnginePool, pods: Iterable[EnginePod]) -> list[EnginePod]:
    """Pods that the pool selects and that are ready, by name."""
    namespace = pool.metadata.namespace
    selected = (
        pod
        for pod in pods
        if pod.ready_since is not None and pod.key[0] == namespace and pool.spec.selector.matches(pod.labels)
    )
    return sorted(selected, key=lambda pod: pod.key)
