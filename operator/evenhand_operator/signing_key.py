"""SigningKey: the operator's own key pairs, which it makes and rotates itself; private halves never leave its namespace.

They are in a Secret: the current one, with which is signed, the next one, and the public half of the previous one. Pods are
given all three public halves, so that each is known to them for a long time before it is used, and what was stored is
believed for as long after. Delete the Secret where a key may be known to others: a new pair is made, and pods take it as
soon as the kubelet has brought them its public half.
"""

import base64
import logging

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from evenhand_operator.clock import SYSTEM_CLOCK, Clock
from evenhand_operator.kube import ApiError, KubeClient
from evenhand_operator.objects import Json, read_time, write_time
from evenhand_operator.resources import SECRETS
from evenhand_policy.signatures import PublicKeys, read_key_set, write_key_set

log = logging.getLogger(__name__)

SECRET_NAME = "evenhand-signing-key"
SECRET_TYPE = "evenhand.dev/signing-key"
_CURRENT, _NEXT, _PREVIOUS = "current.pem", "next.pem", "previous.json"
_SINCE = "evenhand.dev/current-since"


class SigningKey:
    """Reads, makes and rotates; to be used by the leader alone.

    Attributes:
        trusted: public halves that pods are to believe, in order of preference.
    """

    def __init__(self, kube: KubeClient, namespace: str, rotation_seconds: float, clock: Clock = SYSTEM_CLOCK) -> None:
        self.trusted: PublicKeys = ()
        self._kube = kube
        self._namespace = namespace
        self._rotation_seconds = rotation_seconds
        self._clock = clock
        self._current: Ed25519PrivateKey | None = None

    @property
    def current(self) -> Ed25519PrivateKey:
        """The key to sign with; there is one after the first `refresh`."""
        assert self._current is not None
        return self._current

    async def refresh(self) -> bool:
        """Take in what is stored, make it where there is nothing usable, rotate it where it is old; returns whether
        anything is another than before. Raises ApiError; a 409 means that somebody else has just written it."""
        before = self.trusted
        secret = await self._read()
        if secret is None or not self._take(secret):
            made = key_data(Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate())
            secret = await self._write(secret, made)
            self._take(secret)
            log.warning("made a new key to sign with")
        elif self._clock.wall() - _since(secret) > self._rotation_seconds:
            current, upcoming = _keys(secret)
            rotated = key_data(upcoming, Ed25519PrivateKey.generate(), (current.public_key(),))
            self._take(await self._write(secret, rotated))
            log.info("rotated the key to sign with")
        return [each.public_bytes_raw() for each in before] != [each.public_bytes_raw() for each in self.trusted]

    def _take(self, secret: Json) -> bool:
        try:
            current, upcoming = _keys(secret)
        except (KeyError, ValueError, TypeError, UnsupportedAlgorithm):
            log.error("the Secret %s/%s holds no usable keys", self._namespace, SECRET_NAME)
            return False
        previous = read_key_set(_data(secret).get(_PREVIOUS, b""))
        self._current = current
        self.trusted = (current.public_key(), upcoming.public_key(), *previous)
        return True

    async def _read(self) -> Json | None:
        try:
            return await self._kube.get(SECRETS, self._namespace, SECRET_NAME)
        except ApiError as error:
            if error.status != 404:
                raise
            return None

    async def _write(self, before: Json | None, data: dict[str, bytes]) -> Json:
        """Compare and swap: of two leaders, one makes the key."""
        metadata: Json = {
            "name": SECRET_NAME,
            "namespace": self._namespace,
            "labels": {"app.kubernetes.io/managed-by": "evenhand-operator"},
            "annotations": {_SINCE: write_time(self._clock.wall())},
        }
        encoded = {name: base64.b64encode(value).decode() for name, value in data.items()}
        secret: Json = {"metadata": metadata, "type": SECRET_TYPE, "data": encoded}
        if before is None:
            return await self._kube.create(SECRETS, secret)
        metadata["resourceVersion"] = before["metadata"]["resourceVersion"]
        return await self._kube.replace(SECRETS, secret)


def _data(secret: Json) -> dict[str, bytes]:
    return {name: base64.b64decode(text) for name, text in (secret.get("data") or {}).items()}


def _keys(secret: Json) -> tuple[Ed25519PrivateKey, Ed25519PrivateKey]:
    data = _data(secret)
    current, upcoming = (load_pem_private_key(data[name], None) for name in (_CURRENT, _NEXT))
    if not isinstance(current, Ed25519PrivateKey) or not isinstance(upcoming, Ed25519PrivateKey):
        raise TypeError("not Ed25519")
    return current, upcoming


def _since(secret: Json) -> float:
    return read_time((secret["metadata"].get("annotations") or {}).get(_SINCE))


def key_data(
    current: Ed25519PrivateKey, upcoming: Ed25519PrivateKey, previous: tuple[Ed25519PublicKey, ...] = ()
) -> dict[str, bytes]:
    """What the Secret holds."""

    def pem(key: Ed25519PrivateKey) -> bytes:
        return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())

    return {_CURRENT: pem(current), _NEXT: pem(upcoming), _PREVIOUS: write_key_set(previous)}
