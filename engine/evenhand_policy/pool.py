"""EnginePool: which engines belong together, who may use them, and what holds for all of them."""

from enum import StrEnum
from typing import Annotated, Any, ClassVar, Literal

from msgspec import Meta, field

from evenhand_policy.config import UnknownTenantAction
from evenhand_policy.grants import Grant
from evenhand_policy.labels import LabelSelector
from evenhand_policy.schema import Duration, Metadata, Model, Rule, within
from evenhand_policy.secret import SecretKeys
from evenhand_policy.spec import LimitsSpec


class NamespacesFrom(StrEnum):
    """Where the policies of a pool may live."""

    SAME = "Same"
    ALL = "All"
    SELECTOR = "Selector"


class AllowedNamespaces(Model, frozen=True, kw_only=True):
    """Namespaces whose policies the pool accepts."""

    from_: Annotated[
        NamespacesFrom,
        Meta(description="Same: the pool's own namespace. All: every one. Selector: those whose labels match."),
    ] = field(default=NamespacesFrom.SAME, name="from")
    selector: Annotated[
        LabelSelector | None, Meta(description="Labels of the namespaces; set if and only if from is Selector.")
    ] = None

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "set selector if and only if from is Selector",
            "has(self.selector) == (self.from == 'Selector')",
            lambda allowed: (allowed.selector is not None) == (allowed.from_ is NamespacesFrom.SELECTOR),
        ),
    )


class PricesSpec(Model, frozen=True, kw_only=True):
    """Cost of one token in units of service. Cached and recomputed tokens cost nothing."""

    input_token: Annotated[int, Meta(ge=1, le=1000, description="Cost of a prompt token that is computed.")] = 1
    output_token: Annotated[int, Meta(ge=1, le=1000, description="Cost of a token that is generated.")] = 2
    context_token: Annotated[
        int,
        Meta(
            ge=0,
            le=1000,
            description="Cost of 1,000 tokens before it that a computed token attends to, for machines on which a long "
            "context makes a step long.",
        ),
    ] = 0


class UnknownTenantsSpec(Model, frozen=True, kw_only=True):
    """Requests that no policy claims."""

    action: Annotated[
        UnknownTenantAction,
        Meta(description="Share: all of them together are one tenant. Reject: they are refused with invalid_api_key."),
    ] = UnknownTenantAction.SHARE
    weight: Annotated[int, Meta(ge=1, le=1000, description="Weight of all of them together.")] = 1


HeaderName = Annotated[
    str,
    Meta(
        pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?\Z",
        max_length=63,
        extra={"expected": "the name of an HTTP header in lower case"},
    ),
]


class GatewaySpec(Model, frozen=True, kw_only=True):
    """A trusted gateway in front of the engines."""

    api_keys: Annotated[SecretKeys, Meta(description="The keys by which the gateway proves itself.")]
    tenant_headers: Annotated[
        tuple[HeaderName, ...],
        Meta(
            max_length=8,
            description="Headers, in lower case, in which the gateway names the tenant: the first that a request has "
            "counts; tenantHeader alone where not set.",
            extra_json_schema={"x-kubernetes-list-type": "atomic"},
        ),
    ] = ()
    tenant_header: Annotated[HeaderName, Meta(description="The same where it is one header.")] = "x-evenhand-tenant"

    @property
    def headers(self) -> tuple[str, ...]:
        """Headers in which the gateway names the tenant, in the order in which they count."""
        return self.tenant_headers or (self.tenant_header,)


class PoolDefaults(Model, frozen=True, kw_only=True):
    """What holds for a policy that does not say otherwise."""

    limits: Annotated[
        LimitsSpec | None, Meta(description="Limits of every policy, one by one where the policy does not set them.")
    ] = None


class ServiceAccountTokensSpec(Model, frozen=True, kw_only=True):
    """Tokens of ServiceAccounts, by which workloads prove who they are."""

    audience: Annotated[
        Annotated[str, Meta(min_length=1, max_length=255, pattern=r"^[!-~]+\Z")] | None,
        Meta(
            description="Audience that a token must have; evenhand/NAMESPACE/NAME of the pool where not set, so that "
            "none of another pool is taken."
        ),
    ] = None
    max_age: Annotated[
        Duration, Meta(description="Oldest token that is taken, from the time at which it was issued.")
    ] = "24h"

    rules: ClassVar[tuple[Rule, ...]] = (within("maxAge", "max_age", "1m", "8760h"),)


class OnDeletion(StrEnum):
    """What becomes of a pool's engines when the pool is deleted."""

    KEEP = "Keep"
    CLOSE = "Close"


class EnginePoolSpec(Model, frozen=True, kw_only=True):
    """Which engines form the pool, and what holds for all of them."""

    selector: Annotated[
        LabelSelector, Meta(description="Labels of the engine pods, in the pool's namespace; not empty.")
    ]
    allowed_namespaces: Annotated[
        AllowedNamespaces, Meta(description="Namespaces whose TenantPolicies may refer to this pool.")
    ] = AllowedNamespaces()
    grants: Annotated[
        tuple[Grant, ...],
        Meta(
            max_length=64,
            description="What policies of other namespaces than the pool's may claim; the first that selects a "
            "namespace holds for it. A namespace without one has what the defaults of a grant say.",
            extra_json_schema={"x-kubernetes-list-type": "atomic"},
        ),
    ] = ()
    defaults: Annotated[
        PoolDefaults | None, Meta(description="What holds for a policy that does not say otherwise.")
    ] = None
    prices: Annotated[PricesSpec, Meta(description="Cost of tokens, by which service is measured.")] = PricesSpec()
    unknown_tenants: Annotated[
        UnknownTenantsSpec, Meta(description="What happens to requests that no policy claims.")
    ] = UnknownTenantsSpec()
    gateway: Annotated[
        GatewaySpec | None,
        Meta(description="A trusted gateway. Identities of type Header count only on requests that carry its key."),
    ] = None
    service_account_tokens: Annotated[
        ServiceAccountTokensSpec, Meta(description="Which tokens of ServiceAccounts the engines take.")
    ] = ServiceAccountTokensSpec()
    paused: Annotated[
        bool, Meta(description="Whether the engines keep the document that they have, whatever changes.")
    ] = False
    on_deletion: Annotated[
        OnDeletion,
        Meta(
            description="What becomes of the engines when the pool is deleted. Keep: they go on with what they have. "
            "Close: they are told to admit nobody any more."
        ),
    ] = OnDeletion.KEEP

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "selector must not be empty: it would select every pod of the namespace",
            "has(self.selector.matchLabels) && self.selector.matchLabels.size() > 0 || "
            "has(self.selector.matchExpressions) && self.selector.matchExpressions.size() > 0",
            lambda spec: bool(spec.selector.match_labels or spec.selector.match_expressions),
        ),
    )


class EnginePool(Model, frozen=True, kw_only=True):
    """A set of engine pods that enforce one document, compiled from the TenantPolicies that refer to the pool."""

    api_version: Literal["evenhand.dev/v1alpha1"]
    kind: Literal["EnginePool"]
    metadata: Metadata
    spec: Annotated[EnginePoolSpec, Meta(description="What the pool is.")]
    status: dict[str, Any] | None = None

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "the name of an EnginePool has at most 63 lower-case letters, digits and inner dashes: it becomes part of "
            "the names of Secrets, and a label",
            "self.metadata.name.size() <= 63 && self.metadata.name.matches('^[a-z0-9]([-a-z0-9]*[a-z0-9])?$')",
            lambda pool: len(pool.metadata.name) <= 63 and "." not in pool.metadata.name,
        ),
    )


def default_audience(namespace: str, name: str) -> str:
    """Audience of the tokens that engines of that pool take."""
    return f"evenhand/{namespace}/{name}"
