"""The bootstrap Secrets of a pool: read by a new leader to continue where the last one was, written after changes.

Every write is fenced: by the resourceVersion that was read, and by the epoch in the manifest that was read, so that a
leader that slept changes nothing that its successor wrote.
"""

import asyncio
import base64
import logging
from collections.abc import Mapping

import msgspec

from evenhand_operator.kube import ApiError, KubeClient
from evenhand_operator.objects import Json, ObjectKey
from evenhand_operator.observed import ObservedPool
from evenhand_operator.offer import Offer
from evenhand_operator.resources import ENGINE_POOLS, SECRETS
from evenhand_operator.rollout import Stored
from evenhand_operator.signing_key import SigningKey
from evenhand_policy.bootstrap import (
    MAX_PARTS,
    SECRET_TYPE,
    BootstrapError,
    pack,
    pack_manifest,
    read_manifest,
    secret_name,
    unpack,
)
from evenhand_policy.compact import compact
from evenhand_policy.config import PoolReference
from evenhand_policy.push_document import Document, DocumentRejectedError, decompress, read_document
from evenhand_policy.signatures import PublicKeys

log = logging.getLogger(__name__)

_PLACES: tuple[int | None, ...] = (*reversed(range(MAX_PARTS)), None)
"""In the order in which they are written: the manifest last, so that what it names is there already."""


class SupersededError(Exception):
    """A leader of a higher epoch has stored something."""


class _Held(msgspec.Struct, frozen=True):
    """A Secret as it was last read or written."""

    resource_version: str
    owner: str
    data: dict[str, bytes]


class BootstrapStore:
    """Remembers what is stored, so that only Secrets that differ are written; `forget` has it read anew."""

    def __init__(self, kube: KubeClient, key: SigningKey) -> None:
        self._kube = kube
        self._key = key
        self._held: dict[ObjectKey, dict[int | None, _Held | None]] = {}

    async def read(self, observed: ObservedPool) -> Stored:
        """What an earlier leader left. Raises ApiError."""
        held = await self._look(observed.key)
        files = {name: value for each in held.values() if each is not None for name, value in each.data.items()}
        if not files:
            return Stored(0)
        try:
            manifest, compressed = unpack(files, self._key.trusted)
            content = decompress(compressed, manifest.digest)
            config = read_document(content)
        except (BootstrapError, DocumentRejectedError) as error:
            log.warning("the stored document of pool %s/%s cannot be used: %s", *observed.key, error)
            return Stored(0)
        document = Document(manifest.digest, compressed, len(content), compact(config).members)
        return Stored(manifest.revision, manifest.num_replicas, config, document)

    async def trust(self, observed: ObservedPool, offer: Offer | None) -> None:
        """Let pods know whom to believe, with or without a document. Raises ApiError.

        What is stored stays, where one of our keys has signed it. Where none has, since they were made anew, and it is the
        document that is offered, it is signed again in the same write, so that a pod that starts finds all of it.
        """
        held = await self._remembered(observed.key)
        is_ours = _is_signed(held[None], self._key.trusted)
        is_offered = offer is not None and not is_ours and self._holds(held, offer)
        await self._write(observed, offer if is_offered else None)

    async def write(self, observed: ObservedPool, offer: Offer) -> None:
        """Store what is offered.

        Raises:
            ApiError: not everything was written; to be called again.
            SupersededError: it is no longer for this leader to write.
        """
        await self._write(observed, offer)

    @staticmethod
    def _holds(held: Mapping[int | None, _Held | None], offer: Offer) -> bool:
        """Whether the parts that are stored are those of the offered document, whoever wrote them."""
        parts = pack(offer.document)
        return all((each := held[index]) is not None and each.data == part for index, part in enumerate(parts))

    def forget(self, pool: ObjectKey) -> None:
        """What is stored may be another by now, or gone with its pool."""
        self._held.pop(pool, None)

    async def _write(self, observed: ObservedPool, offer: Offer | None) -> None:
        held = await self._remembered(observed.key)
        self._check_epoch(held[None], offer)
        wanted = self._contents(observed, offer, held[None])
        try:
            for place in _PLACES:
                if place in wanted:
                    await self._store(observed, place, wanted[place])
        except ApiError:
            self.forget(observed.key)  # what is there has to be read before the next try
            raise

    def _check_epoch(self, manifest: _Held | None, offer: Offer | None) -> None:
        if manifest is None or offer is None:
            return
        try:
            stored = read_manifest(manifest.data, self._key.trusted)
        except BootstrapError:
            return
        if stored.epoch > offer.version.epoch:
            raise SupersededError(f"a document of epoch {stored.epoch} is stored, ours is of {offer.version.epoch}")

    def _contents(
        self, observed: ObservedPool, offer: Offer | None, manifest: _Held | None
    ) -> Mapping[int | None, dict[str, bytes]]:
        """By place. Without an offer what is stored stays, but for the keys, and for what none of them has signed."""
        namespace, name = observed.key
        if offer is None:
            keys = pack_manifest(
                self._key.current,
                self._key.trusted,
                cluster="",
                pool=PoolReference(namespace=namespace, name=name),
                assignment=None,
                parts=[],
            )
            stored = manifest.data if manifest is not None and _is_signed(manifest, self._key.trusted) else {}
            return {None: stored | keys}
        parts = pack(offer.document)
        contents: dict[int | None, dict[str, bytes]] = dict(enumerate(parts))
        for index in range(len(parts), MAX_PARTS):
            if self._held[observed.key].get(index) is not None:
                contents[index] = {}
        contents[None] = pack_manifest(
            self._key.current,
            self._key.trusted,
            cluster=offer.cluster,
            pool=offer.pool,
            assignment=offer.assignment,
            parts=parts,
        )
        return contents

    async def _store(self, observed: ObservedPool, place: int | None, data: dict[str, bytes]) -> None:
        held = self._held[observed.key]
        before = held.get(place)
        if before is not None and before.data == data and before.owner == observed.uid:
            return
        secret = _secret(observed, place, data)
        if before is None:
            stored = await self._kube.create(SECRETS, secret)
        else:
            secret["metadata"]["resourceVersion"] = before.resource_version
            stored = await self._kube.replace(SECRETS, secret)
        held[place] = _Held(stored["metadata"]["resourceVersion"], observed.uid, data)

    async def _remembered(self, pool: ObjectKey) -> dict[int | None, _Held | None]:
        return self._held[pool] if pool in self._held else await self._look(pool)

    async def _look(self, pool: ObjectKey) -> dict[int | None, _Held | None]:
        """Read what is there; a write that failed may have left gaps."""
        found = await asyncio.gather(*(self._read_secret(pool, place) for place in _PLACES))
        self._held[pool] = dict(zip(_PLACES, found, strict=True))
        return self._held[pool]

    async def _read_secret(self, pool: ObjectKey, place: int | None) -> _Held | None:
        try:
            secret = await self._kube.get(SECRETS, pool[0], secret_name(pool[1], place))
        except ApiError as error:
            if error.status != 404:
                raise
            return None
        metadata = secret["metadata"]
        owners = metadata.get("ownerReferences") or [{}]
        data = {name: base64.b64decode(text) for name, text in (secret.get("data") or {}).items()}
        return _Held(metadata["resourceVersion"], owners[0].get("uid", ""), data)


def _is_signed(manifest: _Held | None, keys: PublicKeys) -> bool:
    try:
        read_manifest(manifest.data if manifest is not None else {}, keys)
    except BootstrapError:
        return False
    return True


def _secret(observed: ObservedPool, place: int | None, content: Mapping[str, bytes]) -> Json:
    namespace, name = observed.key
    owner = {
        "apiVersion": ENGINE_POOLS.api_version,
        "kind": ENGINE_POOLS.kind,
        "name": name,
        "uid": observed.uid,
        "blockOwnerDeletion": False,
    }
    return {
        "metadata": {
            "name": secret_name(name, place),
            "namespace": namespace,
            "labels": {"app.kubernetes.io/managed-by": "evenhand-operator", "evenhand.dev/pool": name[:63]},
            "ownerReferences": [owner],
        },
        "type": SECRET_TYPE,
        "data": {key: base64.b64encode(value).decode() for key, value in content.items()},
    }
