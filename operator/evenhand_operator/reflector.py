"""Reflector: keeps what is known of one kind true, by a list and then a watch from where the list ended.

A watch goes on at the version that it last saw, of which bookmarks tell even where nothing changes; where the API server
has forgotten that version (410), everything is listed anew. So nothing is missed, a deletion neither.
"""

import asyncio
import logging
from collections.abc import Callable, Iterable
from typing import NamedTuple, Protocol

from evenhand_operator.clock import SYSTEM_CLOCK, Clock
from evenhand_operator.kube import ApiError, KubeClient
from evenhand_operator.objects import Json, Meta
from evenhand_operator.resources import Resource

log = logging.getLogger(__name__)

_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 0.2, 5.0
_FORBIDDEN_SECONDS = 10.0  # an API server that starts forbids too much for a moment


class Sink(Protocol):
    """Who is told what there is."""

    def take(self, obj: Json) -> Meta:
        """An object of a list."""

    def observe(self, event: str, obj: Json) -> None:
        """An event: ADDED, MODIFIED or DELETED."""

    def keep_only(self, present: Iterable[Meta], version: int, namespace: str | None) -> None:
        """At that version there was no more than this in the namespace, or anywhere."""


class Scope(NamedTuple):
    """What a reflector looks at: a kind, in one namespace or (None) in all, by selectors as they are sent."""

    resource: Resource
    namespace: str | None
    parameters: dict[str, str]

    def __str__(self) -> str:
        return f"{self.resource.plural} of {f'namespace {self.namespace}' if self.namespace else 'all namespaces'}"


class HistoryLostError(Exception):
    """The API server is at an earlier state than before, as after etcd was restored from a backup: what is remembered is of a
    future that is not going to be, and would be believed rather than what is so. Only a process that begins anew is right."""


class Reflector:
    """One kind in one scope.

    Args:
        access_changed: called when `is_forbidden` changes.

    Attributes:
        known: set once everything was listed, or the API server has long enough refused to tell.
        is_forbidden: whether it goes on refusing.
    """

    def __init__(
        self,
        kube: KubeClient,
        scope: Scope,
        sink: Sink,
        access_changed: Callable[[], None] = lambda: None,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        self.scope = scope
        self.known = asyncio.Event()
        self.is_forbidden = False
        self._kube = kube
        self._sink = sink
        self._access_changed = access_changed
        self._clock = clock
        self._forbidden_since: float | None = None
        self._listed = 0  # version of the latest list
        self._pause = _FIRST_PAUSE_SECONDS

    async def run(self) -> None:
        """List and watch until cancelled. Raises HistoryLostError."""
        while True:
            version = await self.list()
            while version is not None:
                version = await self._watch(version)

    async def list(self) -> int | None:
        """List, however often it takes; returns the version of the list, or None where it is forbidden. Raises
        HistoryLostError."""
        while True:
            try:
                version = await self._list()
            except ApiError as error:
                self._look_at_refusal(error)
                await self._rest()
                if self.is_forbidden:
                    return None
                continue
            self._forbidden_since, self._pause = None, _FIRST_PAUSE_SECONDS
            self._set_forbidden(False)
            return version

    async def _list(self) -> int:
        resource, namespace, parameters = self.scope
        present: list[Meta] = []
        version = 0
        async for page in self._kube.list_pages(resource, namespace, **parameters):
            present += map(self._sink.take, page.items)
            version = page.version
        if version < self._listed:
            raise HistoryLostError(f"{self.scope} were listed at version {self._listed}, and now at {version}")
        self._listed = version
        self._sink.keep_only(present, version, namespace)
        self.known.set()
        return version

    async def _watch(self, version: int) -> int | None:
        """Follow from a version on; returns that from which to go on, None where everything has to be listed."""
        resource, namespace, parameters = self.scope
        try:
            async for event, obj in self._kube.watch(resource, namespace, version, **parameters):
                self._pause = _FIRST_PAUSE_SECONDS
                version = int(obj["metadata"]["resourceVersion"])
                if event != "BOOKMARK":
                    self._sink.observe(event, obj)
        except ApiError as error:
            if error.status == 410:
                return None
            log.info("the watch of %s was cut: %s", self.scope, error)
            await self._rest()
            return version if error.is_transient else None
        return version

    def _look_at_refusal(self, error: ApiError) -> None:
        """A namespace that was deleted answers 403, since its RoleBinding went first; others must not wait for it."""
        advice = (
            "; are the CustomResourceDefinitions installed (kubectl apply -f crds/)?" if error.status == 404 else ""
        )
        log.warning("cannot list %s: %s%s", self.scope, error, advice)
        if error.status != 403 or self.scope.namespace is None:
            return
        now = self._clock.monotonic()
        if self._forbidden_since is None:
            self._forbidden_since = now
        if now - self._forbidden_since >= _FORBIDDEN_SECONDS:
            self._set_forbidden(True)
            self.known.set()

    def _set_forbidden(self, is_forbidden: bool) -> None:
        if self.is_forbidden is not is_forbidden:
            self.is_forbidden = is_forbidden
            self._access_changed()

    async def _rest(self) -> None:
        """Shortly at first, since an API server that restarts is soon back."""
        await asyncio.sleep(self._clock.spread(self._pause))
        self._pause = min(self._pause * 1.5, _LONGEST_PAUSE_SECONDS)
