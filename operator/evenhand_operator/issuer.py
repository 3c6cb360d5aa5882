"""What engines need to verify ServiceAccount tokens without asking the API server: its issuer and its public keys."""

import asyncio
import logging
from collections.abc import Callable

import msgspec

from evenhand_operator.kube import ApiError, KubeClient
from evenhand_policy.config import ServiceAccountIssuer

log = logging.getLogger(__name__)

AUDIENCE = "evenhand"
_DISCOVERY_PATH = "/.well-known/openid-configuration"
_KEYS_PATH = "/openid/v1/jwks"
_RETRY_SECONDS = 2.0


class _Discovery(msgspec.Struct):
    issuer: str


class _KeySet(msgspec.Struct):
    keys: list[dict[str, str | list[str]]]


async def read_issuer(kube: KubeClient) -> ServiceAccountIssuer | None:
    """The API server's issuer and keys; None where it does not tell them to us.

    Raises:
        ApiError: it could not be reached.
    """
    try:
        discovery = msgspec.convert(await kube.get_raw(_DISCOVERY_PATH), _Discovery)
        key_set = msgspec.convert(await kube.get_raw(_KEYS_PATH), _KeySet)
    except msgspec.ValidationError as error:
        log.warning("the API server's token issuer cannot be understood: %s", error)
        return None
    except ApiError as error:
        if error.is_transient:
            raise
        log.warning("the API server's token issuer cannot be read, so ServiceAccounts are not known: %s", error)
        return None
    keys = sorted(key_set.keys, key=lambda key: str(key.get("kid")))
    return ServiceAccountIssuer(issuer=discovery.issuer, audience=AUDIENCE, jwks={"keys": keys})


class IssuerWatch:
    """Keeps `issuer` up to date; `changed` is called when it becomes another one."""

    def __init__(self, kube: KubeClient, changed: Callable[[], None]) -> None:
        self.issuer: ServiceAccountIssuer | None = None
        self._kube = kube
        self._changed = changed

    async def read(self) -> None:
        """Returns once the API server has answered."""
        while True:
            try:
                found = await read_issuer(self._kube)
            except ApiError as error:
                log.warning("cannot read the token issuer: %s", error)
                await asyncio.sleep(_RETRY_SECONDS)
                continue
            if found is not None and found != self.issuer:
                self.issuer = found
                self._changed()
            return

    async def run(self, refresh_seconds: float) -> None:
        """The keys are rotated from time to time; a new one is published for long before it signs."""
        while True:
            await asyncio.sleep(refresh_seconds)
            await self.read()
