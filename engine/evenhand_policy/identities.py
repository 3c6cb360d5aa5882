"""What a policy claims for itself alone: its tenant name, and the keys, ServiceAccounts and header values it is known by."""

from collections.abc import Mapping
from enum import StrEnum
from typing import NamedTuple

from evenhand_policy.credentials import (
    MAX_KEY_CHARACTERS,
    MAX_KEYS_PER_SECRET,
    MIN_KEY_CHARACTERS,
    is_sendable,
    is_strong,
    key_hash,
)
from evenhand_policy.errors import PolicyProblem, Reason, problem_of
from evenhand_policy.pool import EnginePool
from evenhand_policy.secret import Secret
from evenhand_policy.spec import TenantPolicy

ObjectKey = tuple[str, str]
"""Namespace and name."""


class ClaimKind(StrEnum):
    """What can have one claimant in a pool."""

    TENANT = "tenant"
    KEY_HASH = "key"
    SERVICE_ACCOUNT = "ServiceAccount"
    HEADER_VALUE = "header value"


class Claim(NamedTuple):
    """One thing that a policy wants for itself. `what` names it in messages; of a key it tells the place only. `uid` is that
    of the ServiceAccount, where only that one is meant."""

    kind: ClaimKind
    value: str
    what: str
    path: str
    uid: str = ""

    @property
    def conflict(self) -> Reason:
        """Reason of the policy that comes second."""
        return Reason.CONFLICTED if self.kind is ClaimKind.TENANT else Reason.IDENTITY_CONFLICTED


def read_claims(
    policy: TenantPolicy, tenant_id: str, secrets: Mapping[ObjectKey, Secret]
) -> tuple[list[Claim], list[PolicyProblem]]:
    """Everything the policy claims as that tenant, and what is wrong with the Secrets that it names."""
    tenant_path = "spec.tenant" if policy.spec.tenant else "metadata.name"
    claims = [Claim(ClaimKind.TENANT, tenant_id, f"tenant {tenant_id}", tenant_path)]
    problems: list[PolicyProblem] = []
    for index, identity in enumerate(policy.spec.identities):
        path = f"spec.identities[{index}]"
        if identity.api_key is not None:
            keys, found = read_keys(policy, identity.api_key.secret_ref.name, f"{path}.apiKey.secretRef.name", secrets)
            claims += keys
            problems += found
        elif identity.service_account is not None:
            account = identity.service_account
            user = f"system:serviceaccount:{account.namespace or policy.metadata.namespace}:{account.name}"
            what = f"ServiceAccount {user}"
            claims.append(Claim(ClaimKind.SERVICE_ACCOUNT, user, what, f"{path}.serviceAccount", account.uid or ""))
        elif identity.service_account_namespace is not None:
            namespace = identity.service_account_namespace.namespace or policy.metadata.namespace
            group, what = service_account_group(namespace), f"every ServiceAccount of namespace {namespace}"
            claims.append(Claim(ClaimKind.SERVICE_ACCOUNT, group, what, f"{path}.serviceAccountNamespace"))
        elif identity.header is not None:
            value = identity.header.value
            claims.append(Claim(ClaimKind.HEADER_VALUE, value, f"header value {value}", f"{path}.header.value"))
    return claims, problems


def service_account_group(namespace: str) -> str:
    """The group to which Kubernetes counts every ServiceAccount of a namespace."""
    return f"system:serviceaccounts:{namespace}"


def read_keys(
    owner: TenantPolicy | EnginePool, name: str, path: str, secrets: Mapping[ObjectKey, Secret]
) -> tuple[list[Claim], list[PolicyProblem]]:
    """A claim for each key in the Secret `name` beside `owner`, and what is wrong with the Secret."""
    secret = secrets.get((owner.metadata.namespace, name))
    if secret is None:
        advice = (
            f"there is no Secret {name} in namespace {owner.metadata.namespace}; create it, with keys as its values"
        )
        return [], [problem_of(owner, Reason.SECRET_NOT_FOUND, path, advice)]
    values = secret.values
    if not values:
        return [], [problem_of(owner, Reason.SECRET_NOT_FOUND, path, f"Secret {name} holds no key; add one as a value")]
    if len(values) > MAX_KEYS_PER_SECRET:
        advice = f"Secret {name} holds {len(values)} keys; at most {MAX_KEYS_PER_SECRET} are allowed"
        return [], [problem_of(owner, Reason.INVALID, path, advice)]
    problems = [
        problem_of(owner, reason, path, f"the key under {place} of Secret {name} {advice}")
        for place, key in values.items()
        for reason, advice in _weaknesses(key)
    ]
    keys = [
        Claim(ClaimKind.KEY_HASH, key_hash(key), f"the key under {place} of Secret {name}", path)
        for place, key in values.items()
    ]
    return keys, problems


def _weaknesses(key: bytes) -> list[tuple[Reason, str]]:
    if not is_strong(key):
        return [(Reason.WEAK_KEY, f"has fewer than {MIN_KEY_CHARACTERS} characters; use a long random one")]
    if not is_sendable(key):
        advice = f"cannot be sent in a header; use at most {MAX_KEY_CHARACTERS} visible ASCII characters without spaces"
        return [(Reason.INVALID, advice)]
    return []
