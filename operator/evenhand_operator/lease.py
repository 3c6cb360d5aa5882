"""Lease: at most one replica leads, and every term has an epoch higher than all before it.

The epoch is an annotation of the Lease and is raised by the very compare-and-swap that takes it, so that a replica that
was replaced, or was asleep, can never get a higher one. Engines refuse documents of a lower epoch.
"""

import asyncio
import logging
from collections.abc import Callable
from datetime import UTC, datetime
from typing import NoReturn

from evenhand_operator import metrics
from evenhand_operator.clock import SYSTEM_CLOCK, Clock
from evenhand_operator.kube import ApiError, KubeClient
from evenhand_operator.objects import Json
from evenhand_operator.resources import LEASES
from evenhand_operator.settings import Settings
from evenhand_policy.version import MAX_EPOCH

log = logging.getLogger(__name__)

EPOCH_ANNOTATION = "evenhand.dev/epoch"
_RETRY_SECONDS = 0.5


class LeaseLostError(Exception):
    """This replica is not the leader, or cannot show that it still is."""


class Lease:
    """The Lease of this replica. `epoch` is that of its latest term.

    Args:
        least_epoch: an epoch that was seen elsewhere, so that a Lease that was deleted rolls nothing back.
    """

    def __init__(
        self,
        kube: KubeClient,
        namespace: str,
        settings: Settings,
        least_epoch: Callable[[], int],
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        self.epoch = 0
        self._kube = kube
        self._namespace = namespace
        self._settings = settings
        self._least_epoch = least_epoch
        self._clock = clock
        self._held: Json | None = None  # as it was last written by us
        self._renewed_at = 0.0  # monotonic
        self._writing = asyncio.Lock()

    @property
    def installation(self) -> str:
        """Namespace and name of the Lease, by which all replicas of one installation are known."""
        return f"{self._namespace}/{self._settings.lease_name}"

    async def acquire(self) -> None:
        """Returns once this replica leads. The clocks of others do not matter: what counts is how long a Lease was
        seen unchanged."""
        seen_version, unchanged_since = "", self._clock.monotonic()
        while True:
            try:
                lease = await self._read()
                if lease is None or self._may_be_taken(lease):
                    await self._take(lease)
                    return
                if lease["metadata"]["resourceVersion"] != seen_version:
                    seen_version, unchanged_since = lease["metadata"]["resourceVersion"], self._clock.monotonic()
                elif self._clock.monotonic() - unchanged_since > _duration(lease):
                    await self._take(lease)
                    return
            except ApiError as error:
                if error.status != 409:  # another replica was faster
                    log.warning("cannot acquire the lease: %s", error)
            await asyncio.sleep(self._clock.spread(self._settings.renew_seconds / 2))

    async def hold(self) -> None:
        """Renew for as long as it goes.

        Raises:
            LeaseLostError: another replica has it, or it could not be renewed in time.
        """
        while True:
            await asyncio.sleep(self._settings.renew_seconds)
            await self.confirm()

    async def confirm(self) -> None:
        """Renew now. Raises LeaseLostError."""
        deadline = self._renewed_at + self._settings.renew_deadline_seconds
        while True:
            try:
                async with asyncio.timeout(max(0.0, deadline - self._clock.monotonic())):
                    await self._write(self.epoch)
                return
            except TimeoutError:
                raise LeaseLostError("the lease could not be renewed in time") from None
            except ApiError as error:
                log.warning("cannot renew the lease: %s", error)
                await asyncio.sleep(_RETRY_SECONDS)

    async def raise_epoch(self, at_least: int) -> int:
        """A higher epoch, and never less than `at_least`. Raises LeaseLostError, ApiError."""
        await self._write(max(self.epoch + 1, at_least))
        return self.epoch

    async def release(self) -> None:
        """Let another replica take it at once; nothing, if it is not held or the API server is away."""
        if self._held is None:
            return
        held, self._held = self._held, None
        try:
            await self._kube.replace(LEASES, {**held, "spec": {**held["spec"], "holderIdentity": ""}})
        except ApiError as error:
            log.warning("cannot release the lease: %s", error)

    def _may_be_taken(self, lease: Json) -> bool:
        """Nobody has it, or we have, from a write whose answer was lost."""
        return lease.get("spec", {}).get("holderIdentity") in (None, "", self._settings.identity)

    async def _read(self) -> Json | None:
        try:
            return await self._kube.get(LEASES, self._namespace, self._settings.lease_name)
        except ApiError as error:
            if error.status != 404:
                raise
            return None

    async def _take(self, lease: Json | None) -> None:
        before = lease or {}
        spec = before.get("spec", {})
        epoch = max(_epoch(before), self._least_epoch()) + 1
        transitions = spec.get("leaseTransitions", 0) + 1 if lease else 0
        await self._store(before, {"acquireTime": self._now(), "leaseTransitions": transitions}, epoch)
        log.info("leader of epoch %d", epoch)

    async def _write(self, epoch: int) -> None:
        """Renew, by compare-and-swap with what was last written. Raises LeaseLostError, ApiError."""
        async with self._writing:
            if self._held is None:
                raise LeaseLostError("the lease is not held")
            try:
                await self._store(self._held, {}, epoch)
            except ApiError as error:
                if error.status == 404:
                    await self._recreate(epoch)
                elif error.status == 409:
                    await self._adopt_changes()
                    await self._store(self._held, {}, epoch)
                else:
                    raise

    async def _recreate(self, epoch: int) -> None:
        """Somebody deleted the Lease; whoever creates it first has it."""
        try:
            await self._store({}, {"acquireTime": self._now()}, epoch)
        except ApiError as error:
            if error.status == 409:
                self._lose("another replica holds the lease")
            raise

    async def _adopt_changes(self) -> None:
        """Somebody wrote to the Lease: if only something else in it has changed, go on from there."""
        lease = await self._read()
        if lease is None or lease["spec"].get("holderIdentity") != self._settings.identity:
            self._lose("another replica holds the lease")
        if _epoch(lease) != self.epoch:
            self._lose("the epoch of the lease was changed")
        self._held = lease

    def _lose(self, message: str) -> NoReturn:
        self._held = None
        raise LeaseLostError(message)

    async def _store(self, before: Json, changes: Json, epoch: int) -> None:
        metadata = before.get("metadata", {"name": self._settings.lease_name, "namespace": self._namespace})
        annotations = metadata.get("annotations", {}) | {EPOCH_ANNOTATION: str(epoch)}
        spec = before.get("spec", {}) | changes
        spec |= {
            "holderIdentity": self._settings.identity,
            "leaseDurationSeconds": self._settings.lease_seconds,
            "renewTime": self._now(),
        }
        lease = {"metadata": metadata | {"annotations": annotations}, "spec": spec}
        asked_at = self._clock.monotonic()
        write = self._kube.replace if before else self._kube.create
        self._held = await write(LEASES, lease)
        self._renewed_at = asked_at
        self.epoch = epoch
        metrics.EPOCH.set(epoch)

    def _now(self) -> str:
        """As metav1.MicroTime: with exactly six digits of a second."""
        return datetime.fromtimestamp(self._clock.wall(), UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def _duration(lease: Json) -> float:
    return float(lease["spec"].get("leaseDurationSeconds") or 0)


def _epoch(lease: Json) -> int:
    text = lease.get("metadata", {}).get("annotations", {}).get(EPOCH_ANNOTATION, "0")
    epoch = int(text) if text.isascii() and text.isdigit() and len(text) < 20 else 0
    return epoch if epoch < MAX_EPOCH else 0  # nobody could ever go on above it
