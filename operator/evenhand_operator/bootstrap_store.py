"""The bootstrap Secrets of a pool: read by a new leader to continue where the last one was, written after changes."""

import asyncio
import base64
import logging
from dataclasses import dataclass

from evenhand_operator.engine_client import Offer
from evenhand_operator.kube import ENGINE_POOLS, SECRETS, ApiError, KubeClient
from evenhand_operator.objects import Json, ObjectKey
from evenhand_operator.observed import ObservedPool
from evenhand_policy.bootstrap import (
    MAX_PARTS,
    SECRET_TYPE,
    BootstrapError,
    DocumentTooLargeError,
    pack,
    secret_name,
    unpack,
)
from evenhand_policy.config import SchedulerConfig
from evenhand_policy.push_document import DocumentRejectedError, read_document
from evenhand_policy.push_protocol import PushKeys

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class StoredDocument:
    """What an earlier leader has stored. `document` is None where it cannot be read, be it for want of the key."""

    epoch: int
    revision: int
    document: SchedulerConfig | None


class BootstrapStore:
    """Remembers what it has written, so that only Secrets that change are written."""

    def __init__(self, kube: KubeClient) -> None:
        self._kube = kube
        self._written: dict[ObjectKey, list[dict[str, bytes]]] = {}

    async def read(self, pool: ObjectKey, keys: PushKeys) -> StoredDocument:
        """The stored document. Raises ApiError."""
        files: dict[str, bytes] = {}
        for index in range(MAX_PARTS):
            secret = await self._read_secret(pool, index)
            if secret is None:
                break
            self._remember(pool, index, secret)
            files |= self._written[pool][index]
        try:
            manifest, document = unpack(files, keys)
            return StoredDocument(manifest.epoch, manifest.revision, read_document(document))
        except (BootstrapError, DocumentRejectedError) as error:
            if files:
                log.warning("the stored document of pool %s/%s cannot be used: %s", *pool, error)
            return StoredDocument(0, 0, None)

    async def write(self, observed: ObservedPool, offer: Offer) -> None:
        """Store what is offered; the manifest last, so that what pods find is complete as soon as it names it.

        Raises:
            ApiError: not everything was written; to be called again.
        """
        if not offer.keys:
            return
        try:
            parts = await asyncio.to_thread(
                pack, offer.document, offer.epoch, offer.revision, offer.num_replicas, offer.keys
            )
        except DocumentTooLargeError as error:
            log.error("the document of pool %s/%s is not stored: %s", *observed.key, error)
            return
        written = self._written.setdefault(observed.key, [{}] * MAX_PARTS)
        parts += [{}] * (MAX_PARTS - len(parts))
        for index in reversed(range(MAX_PARTS)):
            if written[index] != parts[index]:
                await self._kube.apply(SECRETS, _secret(observed, index, parts[index]))
                written[index] = parts[index]

    def forget(self, pool: ObjectKey) -> None:
        """The pool is gone; its Secrets go with it, since it owns them."""
        self._written.pop(pool, None)

    def _remember(self, pool: ObjectKey, index: int, secret: Json) -> None:
        data = {name: base64.b64decode(text) for name, text in (secret.get("data") or {}).items()}
        self._written.setdefault(pool, [{}] * MAX_PARTS)[index] = data

    async def _read_secret(self, pool: ObjectKey, index: int) -> Json | None:
        try:
            return await self._kube.get(SECRETS, pool[0], secret_name(pool[1], index))
        except ApiError as error:
            if error.status != 404:
                raise
            return None


def _secret(observed: ObservedPool, index: int, content: dict[str, bytes]) -> Json:
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
            "name": secret_name(name, index),
            "namespace": namespace,
            "labels": {"app.kubernetes.io/managed-by": "evenhand-operator", "evenhand.dev/pool": name[:63]},
            "ownerReferences": [owner],
        },
        "type": SECRET_TYPE,
        "data": {key: base64.b64encode(value).decode() for key, value in content.items()},
    }
