"""Which Secrets policies and pools name."""

from collections.abc import Iterable, Iterator

from evenhand_operator.objects import ObjectKey
from evenhand_operator.observed import ObservedPolicy, ObservedPool


def referenced_secrets(policies: Iterable[ObservedPolicy], pools: Iterable[ObservedPool]) -> set[ObjectKey]:
    """Namespace and name of each."""
    return {*_of_policies(policies), *_of_pools(pools)}


def _of_policies(policies: Iterable[ObservedPolicy]) -> Iterator[ObjectKey]:
    for observed in policies:
        for identity in observed.policy.spec.identities if observed.policy else ():
            if identity.api_key is not None:
                yield observed.key[0], identity.api_key.secret_ref.name


def _of_pools(pools: Iterable[ObservedPool]) -> Iterator[ObjectKey]:
    for observed in pools:
        if observed.pool is None:
            continue
        if observed.pool.spec.gateway is not None:
            yield observed.key[0], observed.pool.spec.gateway.api_keys.secret_ref.name
