"""Which Secrets policies and pools name."""

from collections.abc import Iterable, Iterator

from evenhand_operator.objects import ObjectKey
from evenhand_operator.observed import ObservedPolicy, ObservedPool


def referenced_secrets(policies: Iterable[ObservedPolicy], pools: Iterable[ObservedPool]) -> set[ObjectKey]:
    """Namespace and name of each."""
    naming: list[ObservedPolicy | ObservedPool] = [*policies, *pools]
    return {key for observed in naming for key in secrets_of(observed)}


def secrets_of(observed: ObservedPolicy | ObservedPool) -> Iterator[ObjectKey]:
    """Namespace and name of each that one object names; none of one that cannot be read."""
    namespace, _ = observed.key
    if isinstance(observed, ObservedPolicy):
        for identity in observed.policy.spec.identities if observed.policy else ():
            if identity.api_key is not None:
                yield namespace, identity.api_key.secret_ref.name
    elif observed.pool is not None and observed.pool.spec.gateway is not None:
        yield namespace, observed.pool.spec.gateway.api_keys.secret_ref.name
