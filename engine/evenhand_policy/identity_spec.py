"""Identity: how a request proves that it is a tenant's, exactly as users write it in a TenantPolicy."""

from enum import StrEnum
from typing import Annotated, ClassVar

from msgspec import Meta

from evenhand_policy.schema import DnsLabel, DnsName, Model, Rule, Uid
from evenhand_policy.secret import SecretKeys


class IdentityType(StrEnum):
    """How a request proves that it is a tenant's."""

    API_KEY = "APIKey"
    SERVICE_ACCOUNT = "ServiceAccount"
    SERVICE_ACCOUNT_NAMESPACE = "ServiceAccountNamespace"
    HEADER = "Header"


class ServiceAccountIdentity(Model, frozen=True, kw_only=True):
    """A Kubernetes ServiceAccount, proved by a projected token with audience `evenhand`."""

    name: Annotated[DnsName, Meta(description="Name of the ServiceAccount.")]
    namespace: Annotated[
        DnsLabel | None,
        Meta(
            description="Namespace of the ServiceAccount; the policy's own where not set. A policy outside the pool's "
            "namespace may claim ServiceAccounts of its own namespace only."
        ),
    ] = None
    uid: Annotated[
        Uid | None,
        Meta(
            description="Of the ServiceAccount, as metadata.uid tells: one that is deleted and made again by that name is "
            "not taken. Any of that name where not set.",
        ),
    ] = None


class ServiceAccountNamespaceIdentity(Model, frozen=True, kw_only=True):
    """Every ServiceAccount of a namespace, but for those that a policy claims by name."""

    namespace: Annotated[
        DnsLabel | None,
        Meta(
            description="The namespace; the policy's own where not set. A policy outside the pool's namespace may claim "
            "its own namespace only."
        ),
    ] = None


class HeaderIdentity(Model, frozen=True, kw_only=True):
    """A value of the tenant header, believed on requests of the pool's gateway only."""

    value: Annotated[
        str,
        Meta(
            pattern=r"^[!-~]+\Z",
            max_length=253,
            description="Value of the pool's tenant header, compared exactly.",
            extra={"expected": "1 to 253 visible ASCII characters without spaces"},
        ),
    ]


_MEMBERS = (  # type, and the member that it asks for, as it is named in YAML and here
    (IdentityType.API_KEY, "apiKey", "api_key"),
    (IdentityType.SERVICE_ACCOUNT, "serviceAccount", "service_account"),
    (IdentityType.SERVICE_ACCOUNT_NAMESPACE, "serviceAccountNamespace", "service_account_namespace"),
    (IdentityType.HEADER, "header", "header"),
)


class Identity(Model, frozen=True, kw_only=True):
    """One way to prove that a request is this tenant's. Exactly the member that `type` names is set."""

    name: Annotated[DnsLabel, Meta(description="Name of this entry, unique in the list.")]
    type: Annotated[
        IdentityType,
        Meta(
            description="APIKey: a bearer key. ServiceAccount: a projected Kubernetes token. ServiceAccountNamespace: "
            "such a token of any account of a namespace. Header: a header that a trusted gateway sets."
        ),
    ]
    api_key: Annotated[SecretKeys | None, Meta(description="The keys; set if and only if type is APIKey.")] = None
    service_account: Annotated[
        ServiceAccountIdentity | None,
        Meta(description="The ServiceAccount; set if and only if type is ServiceAccount."),
    ] = None
    service_account_namespace: Annotated[
        ServiceAccountNamespaceIdentity | None,
        Meta(
            description="The namespace of the ServiceAccounts, may be empty; set if and only if type is "
            "ServiceAccountNamespace."
        ),
    ] = None
    header: Annotated[HeaderIdentity | None, Meta(description="The header; set if and only if type is Header.")] = None

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "set exactly the member that type names: apiKey for APIKey, serviceAccount for ServiceAccount, "
            "serviceAccountNamespace for ServiceAccountNamespace, header for Header",
            " && ".join(f"has(self.{member}) == (self.type == '{kind}')" for kind, member, _ in _MEMBERS),
            lambda identity: all(
                (getattr(identity, name) is not None) == (identity.type is kind) for kind, _, name in _MEMBERS
            ),
        ),
    )
