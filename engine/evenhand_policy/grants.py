"""Grants: what the policies of namespaces other than the pool's may claim."""

from typing import Annotated, ClassVar

from msgspec import Meta

from evenhand_policy.config import LatencyClass
from evenhand_policy.identity_spec import IdentityType
from evenhand_policy.labels import LabelSelector
from evenhand_policy.schema import Duration, Model, Rule, within


class Grant(Model, frozen=True, kw_only=True):
    """What the policies of each selected namespace may claim. The defaults are what a namespace without a grant has."""

    namespaces: Annotated[
        LabelSelector,
        Meta(
            description="Labels of the namespaces, which the pool's allowedNamespaces must admit besides; empty: every "
            "one. The first grant of the list that selects a namespace holds for it."
        ),
    ]
    max_weight: Annotated[int, Meta(ge=1, le=1000, description="Largest weight of one policy.")] = 1
    max_total_weight: Annotated[
        Annotated[int, Meta(ge=1, le=1_000_000)] | None,
        Meta(
            description="Largest weight of all policies of one namespace together, so that nobody gets a larger share "
            "by more policies; maxWeight where not set."
        ),
    ] = None
    max_guaranteed_percent: Annotated[
        int, Meta(ge=0, le=100, description="Largest kvCache guarantee of all policies of one namespace together.")
    ] = 0
    latency_classes: Annotated[
        tuple[LatencyClass, ...],
        Meta(
            min_length=1,
            max_length=8,
            description="Latency classes that a policy may have.",
            extra_json_schema={"x-kubernetes-list-type": "atomic"},
        ),
    ] = (LatencyClass.STANDARD, LatencyClass.BATCH)
    min_inter_token_latency: Annotated[
        Duration | None,
        Meta(
            description="Least interTokenLatency that a policy may ask for, 1ms to 1m, since it shortens every step of "
            "the engines; not set: a policy may ask for none."
        ),
    ] = None
    identity_types: Annotated[
        tuple[IdentityType, ...],
        Meta(
            max_length=8,
            description="Types of identities that a policy may have.",
            extra_json_schema={"x-kubernetes-list-type": "atomic"},
        ),
    ] = (IdentityType.API_KEY, IdentityType.SERVICE_ACCOUNT)
    tenant_prefix: Annotated[
        Annotated[
            str,
            Meta(
                pattern=r"^([a-z0-9][-a-z0-9.]*)?\Z",
                max_length=63,
                extra={"expected": "how a name of lower-case letters, digits, dashes and dots begins"},
            ),
        ]
        | None,
        Meta(
            description="How the tenant names and header values of the policies must begin; empty: as they like. Not "
            "set: the tenant is NAMESPACE/NAME, and a header value must begin with NAMESPACE/."
        ),
    ] = None

    rules: ClassVar[tuple[Rule, ...]] = (within("minInterTokenLatency", "min_inter_token_latency", "1ms", "1m"),)

    @property
    def total_weight(self) -> int:
        """Largest weight of all policies of one namespace together."""
        return self.max_total_weight or self.max_weight


NO_GRANT = Grant(namespaces=LabelSelector())
"""What a namespace has that no grant selects."""
