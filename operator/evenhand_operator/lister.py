"""Lister: keeps the cache true. It has a Reflector for each kind and served namespace.

Policies and pools are watched by Kopf, whose own list takes seconds with thousands of objects and tells nothing of what
was deleted before it. So their reflectors watch until Kopf has caught up, and list again after every gap, and periodically.
"""

import asyncio
import logging
from collections.abc import Iterable

from evenhand_operator import metrics
from evenhand_operator.cache import Cache
from evenhand_operator.clock import SYSTEM_CLOCK, Clock
from evenhand_operator.debounce import Debounce
from evenhand_operator.kube import ApiError, KubeClient
from evenhand_operator.objects import ObjectKey
from evenhand_operator.reflector import Reflector, Scope, Sink
from evenhand_operator.resources import ENGINE_POOLS, NAMESPACES, PODS, SECRETS, TENANT_POLICIES, Resource
from evenhand_operator.secret_cache import SecretFeed
from evenhand_operator.settings import Settings
from evenhand_policy.secret import API_KEYS_TYPE

log = logging.getLogger(__name__)

# Secrets of these types are never named by a policy, and some are large; those of our own type have a watch of their own
_IGNORED_SECRET_TYPES = (
    "helm.sh/release.v1",
    "kubernetes.io/service-account-token",
    "kubernetes.io/dockerconfigjson",
    "kubernetes.io/tls",
    "evenhand.dev/bootstrap",
    API_KEYS_TYPE,
)
_OTHER_SECRETS = {"fieldSelector": ",".join(f"type!={each}" for each in _IGNORED_SECRET_TYPES)}
_OUR_SECRETS = {"fieldSelector": f"type={API_KEYS_TYPE}"}
_GAP_QUIET_SECONDS, _GAP_LONGEST_SECONDS = 0.5, 20.0  # thousands of objects take Kopf some seconds
_SECOND_LOOK_SECONDS = 30.0
_FIRST_LIST_SECONDS = 15.0
_MAX_READS = 16


class Lister:
    """Owns the reflectors, and the time of the next list of policies and pools.

    Attributes:
        caught_up: set once policies and pools were listed after Kopf had begun, or half a minute after the start.
    """

    def __init__(self, kube: KubeClient, cache: Cache, settings: Settings, clock: Clock = SYSTEM_CLOCK) -> None:
        self._kube = kube
        self._cache = cache
        self._settings = settings
        self._clock = clock
        self.caught_up = asyncio.Event()
        self._gap = Debounce(_GAP_QUIET_SECONDS, _GAP_LONGEST_SECONDS)
        pods = {"labelSelector": settings.pod_selector} if settings.pod_selector else {}
        self._resources = [
            *self._reflectors(TENANT_POLICIES, cache.policies),
            *self._reflectors(ENGINE_POOLS, cache.pools),
        ]
        self._others = [
            *self._reflectors(PODS, cache.pods, pods),
            *self._reflectors(SECRETS, SecretFeed(cache.secrets, ours=True), _OUR_SECRETS),
            *([] if settings.namespaces else self._reflectors(NAMESPACES, cache.namespaces)),
        ]
        self._tasks: asyncio.TaskGroup | None = None
        self._bridges: list[asyncio.Task[None]] = []
        self._secrets: dict[str, tuple[Reflector, asyncio.Task[None]]] = {}  # of other types, by namespace

    def _reflectors(self, resource: Resource, sink: Sink, parameters: dict[str, str] | None = None) -> list[Reflector]:
        """One for each served namespace."""
        return [
            Reflector(self._kube, Scope(resource, namespace, parameters or {}), sink, self._access_changed, self._clock)
            for namespace in self._settings.namespaces or (None,)
        ]

    async def start(self, tasks: asyncio.TaskGroup) -> None:
        """Begin to list and watch, in tasks that end with the group; returns once everything was listed."""
        self._tasks = tasks
        self._bridges = [self._run(reflector) for reflector in self._resources]
        for reflector in self._others:
            self._run(reflector)
        for reflector in (*self._resources, *self._others):
            await reflector.known.wait()
        metrics.LAST_LIST.set(self._clock.wall())

    def _run(self, reflector: Reflector) -> asyncio.Task[None]:
        assert self._tasks is not None
        return self._tasks.create_task(reflector.run(), name=f"reflect {reflector.scope}")

    def gap_seen(self) -> None:
        """Kopf's watch has begun anew: list as soon as that is over."""
        self._gap.signal()

    async def run(self) -> None:
        """List policies and pools after every gap, and periodically; a while after the start and every gap once more,
        since Kopf says nothing of a kind of which it finds no object any more."""
        pause = _SECOND_LOOK_SECONDS
        while True:
            is_gap = await self._gap.wait(timeout=pause) is not None
            await self.list_resources()
            self.caught_up.set()
            while self._bridges:
                self._bridges.pop().cancel()
            pause = _SECOND_LOOK_SECONDS if is_gap else self._settings.relist_seconds

    async def list_resources(self) -> None:
        """Returns once policies and pools have been listed, however long the API server is away."""
        async with asyncio.TaskGroup() as tasks:
            for reflector in self._resources:
                tasks.create_task(reflector.list())
        metrics.LAST_LIST.set(self._clock.wall())

    @property
    def readable_namespaces(self) -> tuple[str, ...]:
        """Served namespaces that can be read."""
        return tuple(each for each in self._settings.namespaces if each not in self._cache.unreadable)

    async def provide_secrets(self, keys: Iterable[ObjectKey]) -> None:
        """From now on these Secrets are followed; returns once each is known, or known not to be there.

        Those that are not of our own type are watched where they are named, namespace by namespace.

        Raises:
            ApiError: the API server does not tell.
        """
        secrets = self._cache.secrets
        secrets.want(wanted := frozenset(keys))
        namespaces = secrets.namespaces_of_others()
        for namespace in self._secrets.keys() - namespaces:
            self._secrets.pop(namespace)[1].cancel()
        feed = SecretFeed(secrets, ours=False)
        for namespace in namespaces - self._secrets.keys():
            reflector = Reflector(self._kube, Scope(SECRETS, namespace, _OTHER_SECRETS), feed, clock=self._clock)
            self._secrets[namespace] = reflector, self._run(reflector)
        try:
            async with asyncio.timeout(_FIRST_LIST_SECONDS):
                for reflector, _ in list(self._secrets.values()):
                    await reflector.known.wait()
        except TimeoutError:
            raise ApiError(0, "not all Secrets that are named could be listed in time") from None
        await self._read_secrets(secrets.want(wanted))

    async def _read_secrets(self, keys: Iterable[ObjectKey]) -> None:
        """Read Secrets that have just become wanted where others were watched already. Raises ApiError."""
        slots = asyncio.Semaphore(_MAX_READS)

        async def read(key: ObjectKey) -> ApiError | None:
            async with slots:
                try:
                    self._cache.secrets.take(await self._kube.get(SECRETS, *key))
                except ApiError as error:
                    if error.status not in (403, 404):
                        return error
                    self._cache.secrets.set_absent(key, 0)
                return None

        for error in await asyncio.gather(*map(read, keys)):
            if error is not None:
                raise error

    def _access_changed(self) -> None:
        """A namespace can be read if all that is in it can: of half a namespace it is not known who may do what."""
        reflectors = (*self._resources, *self._others)
        unreadable = {each.scope.namespace for each in reflectors if each.is_forbidden and each.scope.namespace}
        for namespace in unreadable - self._cache.unreadable:
            log.error(
                "namespace %s cannot be read, and is left out: was it deleted, or the operator's right?", namespace
            )
        if self._cache.unreadable - unreadable:
            self.gap_seen()
        self._cache.set_unreadable(unreadable)
        metrics.UNREADABLE_NAMESPACES.set(len(unreadable))
