"""SidecarService: the owner of what tenants share before an engine that somebody else wrote."""

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from evenhand_engine.backends.upstream import Upstream
from evenhand_engine.frontend.config_in_force import ConfigInForce
from evenhand_engine.frontend.service import Service
from evenhand_engine.frontend.settings import ServerSettings


class SidecarService(Service):
    """What all processes of a sidecar have one of.

    Attributes:
        upstream: the engine behind it, and the queue before that.
    """

    def __init__(self, settings: ServerSettings, upstream: Upstream, in_force: ConfigInForce) -> None:
        super().__init__(settings, upstream, in_force)
        self.upstream = upstream
        self._num_errands = 0
        self._window = CollectorRegistry()
        self._window.register(_WindowCollector(upstream))
        self.metrics.tenant_registry.register(_WindowCollector(upstream))

    def new_errand_id(self) -> str:
        """One that was never given: a queue may know an id for longer than its request lives."""
        self._num_errands += 1
        return str(self._num_errands)

    @property
    def backend_name(self) -> str:
        return self.upstream.connection.backend

    def health(self, now: float) -> str | None:
        problem = None if self.api_side is None else self.api_side.problem
        return problem or self.upstream.problem

    def public_metrics(self) -> bytes:
        """The upstream's own metrics as last scraped, and the window's: nothing of tenants, theirs are on the admin port."""
        return self.upstream.metrics_text + generate_latest(self._window)


class _WindowCollector(Collector):
    """The window's state, read at the time of a scrape."""

    def __init__(self, upstream: Upstream) -> None:
        self._upstream = upstream

    def collect(self) -> Iterable[Metric]:
        dispatcher = self._upstream.dispatcher
        window, request_table = dispatcher.window, dispatcher.request_table
        for name, text, value in (
            ("upstream_up", "1 if the upstream was usable when last probed.", self._upstream.problem is None),
            ("queued_requests", "Requests that wait here for their turn.", request_table.num_waiting),
            ("inflight_requests", "Requests at the upstream.", window.num_in_flight),
            ("inflight_tokens", "Their prompts, outputs and expected outputs.", window.num_tokens),
            ("unstarted_requests", "Of these, without a first chunk.", window.num_unstarted),
            ("unstarted_tokens", "Prompt tokens of those.", window.num_unstarted_tokens),
            ("window_batch_tokens", "Prompt tokens that may be unstarted, as learned.", window.batch_tokens),
            ("window_kv_tokens", "Tokens that may be in flight; Inf: unbounded.", window.kv_tokens),
        ):
            yield GaugeMetricFamily(f"evenhand_sidecar_{name}", text, value=float(value))
