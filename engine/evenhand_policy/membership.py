"""Membership: whether a policy may be a pool's, under which tenant name, and what it may claim there. Pure.

The pool's own namespace may claim anything. Others are guests: `allowedNamespaces` lets them in, `grants` say how much
they may claim. What is not known admits nobody: a namespace whose labels have not been seen yet matches no selector,
not even one that asks for a label's absence.
"""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from evenhand_policy.errors import PolicyProblem, Reason, problem_of, reference
from evenhand_policy.grants import NO_GRANT, Grant
from evenhand_policy.labels import LabelSelector
from evenhand_policy.pool import EnginePool, NamespacesFrom
from evenhand_policy.schema import milliseconds
from evenhand_policy.spec import TenantPolicy

NamespaceLabels = Mapping[str, Mapping[str, str]]
"""Labels of each namespace that is known."""

_NAME_LABEL = "kubernetes.io/metadata.name"


class Admission(NamedTuple):
    """What the pool makes of a policy; it is refused where there are `problems`.

    Attributes:
        tenant_id: name of the tenant in the pool.
        grant: bounds of what all policies of the namespace claim together; None: there are none.
    """

    tenant_id: str
    grant: Grant | None
    problems: tuple[PolicyProblem, ...] = ()


def admit(policy: TenantPolicy, pool: EnginePool | None, namespace_labels: NamespaceLabels) -> Admission:
    """Judge one policy by itself. Without a pool (policy files) everything is allowed."""
    if pool is None:
        return Admission(policy.tenant_id, None)
    if policy.pool_key != (pool.metadata.namespace, pool.metadata.name):
        return Admission(policy.tenant_id, None, (pool_not_found(policy),))
    if policy.metadata.namespace == pool.metadata.namespace:
        return Admission(policy.tenant_id, None)
    guest = _Guest(policy, pool, namespace_labels.get(policy.metadata.namespace))
    if (problem := guest.entry_problem()) is not None:
        return Admission(policy.tenant_id, NO_GRANT, (problem,))
    grant = guest.grant()
    if grant is None:
        return Admission(policy.tenant_id, NO_GRANT, (guest.unknown("spec.grants"),))
    tenant_id = policy.tenant_id if grant.tenant_prefix is not None else f"{guest.namespace}/{policy.tenant_id}"
    return Admission(tenant_id, grant, (*guest.foreign_accounts(), *guest.excesses(grant)))


def pool_not_found(policy: TenantPolicy) -> PolicyProblem:
    """The problem of a policy that refers to a pool which does not exist."""
    namespace, name = policy.pool_key
    advice = f"there is no EnginePool {namespace}/{name}; correct the reference or create the pool"
    return problem_of(policy, Reason.POOL_NOT_FOUND, "spec.poolRef", advice)


def exceeds_grant(policy: TenantPolicy, pool: EnginePool, path: str, excess: str) -> PolicyProblem:
    """The problem of a guest that claims too much; `excess` tells what, and the limit that it passes."""
    advice = (
        f"{excess}, which is what {reference(pool)} grants namespace {policy.metadata.namespace}: change it, or ask "
        "whoever runs the pool for more (its spec.grants)"
    )
    return problem_of(policy, Reason.EXCEEDS_GRANT, path, advice)


class _Guest(NamedTuple):
    """A policy of another namespace than the pool's. `labels` are those of its namespace, None while not known."""

    policy: TenantPolicy
    pool: EnginePool
    labels: Mapping[str, str] | None

    @property
    def namespace(self) -> str:
        return self.policy.metadata.namespace

    def entry_problem(self) -> PolicyProblem | None:
        """Why the pool does not admit the namespace."""
        allowed = self.pool.spec.allowed_namespaces
        if allowed.from_ is NamespacesFrom.ALL:
            return None
        is_selected = allowed.selector is not None and self._is_selected(allowed.selector)
        if is_selected is None:
            return self.unknown("spec.allowedNamespaces")
        if is_selected:
            return None
        advice = (
            f"{reference(self.pool)} admits no policies of namespace {self.namespace}; its allowedNamespaces decide"
        )
        return problem_of(self.policy, Reason.NOT_ALLOWED, "spec.poolRef", advice)

    def grant(self) -> Grant | None:
        """The grant that holds; None where labels decide that are not known."""
        for grant in self.pool.spec.grants:
            is_selected = self._is_selected(grant.namespaces)
            if is_selected is None:
                return None
            if is_selected:
                return grant
        return NO_GRANT

    def _is_selected(self, selector: LabelSelector) -> bool | None:
        name = {_NAME_LABEL: self.namespace}
        return selector.matches_known(name) if self.labels is None else selector.matches({**self.labels, **name})

    def unknown(self, deciding: str) -> PolicyProblem:
        advice = (
            f"the labels of namespace {self.namespace}, by which {deciding} of {reference(self.pool)} decides, are not "
            f"known; where the operator serves single namespaces (or files), select by {_NAME_LABEL} instead"
        )
        return problem_of(self.policy, Reason.NAMESPACE_UNKNOWN, "spec.poolRef", advice)

    def foreign_accounts(self) -> Iterator[PolicyProblem]:
        """A guest may not take over the traffic of another namespace's ServiceAccounts."""
        for index, identity in enumerate(self.policy.spec.identities):
            for member, account in (
                ("serviceAccount", identity.service_account),
                ("serviceAccountNamespace", identity.service_account_namespace),
            ):
                if account is not None and account.namespace not in (None, self.namespace):
                    path = f"spec.identities[{index}].{member}.namespace"
                    advice = (
                        "a policy outside the pool's namespace may claim ServiceAccounts of its own namespace "
                        f"{self.namespace} only"
                    )
                    yield problem_of(self.policy, Reason.NOT_ALLOWED, path, advice)

    def excesses(self, grant: Grant) -> Iterator[PolicyProblem]:
        """What the policy by itself claims beyond the grant."""
        for path, excess in self._excesses(grant):
            yield exceeds_grant(self.policy, self.pool, path, excess)

    def _excesses(self, grant: Grant) -> Iterator[tuple[str, str]]:
        spec = self.policy.spec
        if spec.weight > grant.max_weight:
            yield "spec.weight", f"weight {spec.weight} is above the maxWeight of {grant.max_weight}"
        if spec.latency_class not in grant.latency_classes:
            classes = ", ".join(grant.latency_classes)
            yield "spec.latencyClass", f"{spec.latency_class} is none of the latencyClasses {classes}"
        if spec.slo is not None and (latency := spec.slo.inter_token_latency) is not None:
            path, least = "spec.slo.interTokenLatency", grant.min_inter_token_latency
            if least is None:
                yield path, f"{latency} is set without any minInterTokenLatency"
            elif milliseconds(latency) < milliseconds(least):
                yield path, f"{latency} is below the minInterTokenLatency of {least}"
        yield from self._identity_excesses(grant)

    def _identity_excesses(self, grant: Grant) -> Iterator[tuple[str, str]]:
        spec, prefix = self.policy.spec, grant.tenant_prefix
        if prefix is not None and not self.policy.tenant_id.startswith(prefix):
            path = "spec.tenant" if spec.tenant else "metadata.name"
            yield path, f"tenant {self.policy.tenant_id} does not begin with the tenantPrefix {prefix}"
        for index, identity in enumerate(spec.identities):
            path = f"spec.identities[{index}]"
            if identity.type not in grant.identity_types:
                yield f"{path}.type", f"{identity.type} is none of the identityTypes {', '.join(grant.identity_types)}"
            beginning = f"{self.namespace}/" if prefix is None else prefix
            if identity.header is not None and not identity.header.value.startswith(beginning):
                yield f"{path}.header.value", f"{identity.header.value} does not begin with {beginning}"
