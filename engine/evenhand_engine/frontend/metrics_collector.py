"""Gauges and counters of engine, tenants and config: read at the time of a scrape, not kept."""

from collections import Counter as Counts
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import add

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector

from evenhand_engine.backends.backend import ModelInfo
from evenhand_engine.frontend.share_tracker import Share
from evenhand_engine.messages import EngineStats, TenantStats

OTHER = "other"
_MAX_TENANT_LABELS = 200


class TenantLabels:
    """Bounds the values of the tenant label: the first `limit` tenants are told apart."""

    def __init__(self, limit: int = _MAX_TENANT_LABELS) -> None:
        self._limit = limit
        self._known: set[str] = set()

    def __call__(self, tenant_id: str) -> str:
        if tenant_id not in self._known:
            if len(self._known) >= self._limit:
                return OTHER
            self._known.add(tenant_id)
        return tenant_id


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What a scrape reads of the running server.

    Attributes:
        info: what the backend serves.
        backend: what generates, in a word.
        stats: None before the engine's first step.
        tenants: latest state of each tenant in the engine.
        shares: recent service of each tenant beside its entitlement.
        config_digest, config_source: of the config in force.
        config_is_current: False if a newer one was rejected.
        num_config_reloads: by result, `applied` or `rejected`.
        audited: by tenant, how often each limit would have refused a request.
    """

    info: ModelInfo
    stats: EngineStats | None
    tenants: Sequence[TenantStats]
    shares: Mapping[str, Share]
    config_digest: str
    config_source: str
    config_is_current: bool
    num_config_reloads: Mapping[str, int]
    audited: Mapping[str, Mapping[str, int]]
    backend: str = "evenhand"


class PublicCollector(Collector):
    """State of the engine, under vLLM's names."""

    def __init__(self, names: Mapping[str, str], snapshot: Callable[[], Snapshot]) -> None:
        self._names = names
        self._snapshot = snapshot

    def collect(self) -> Iterable[Metric]:
        snapshot = self._snapshot()
        info, stats = snapshot.info, snapshot.stats
        if info.num_kv_blocks is not None:
            blocks = {"block_size": str(info.block_size), "num_gpu_blocks": str(info.num_kv_blocks)}
            yield self._gauge("cache_config_info", "The KV cache; a block has block_size tokens.", 1, blocks)
        in_use = 0.0 if stats is None else 1 - stats.num_free_kv_blocks / stats.num_kv_blocks
        yield self._gauge("num_requests_running", "Requests that are running.", stats.num_running if stats else 0)
        yield self._gauge("num_requests_waiting", "Requests that wait.", stats.num_waiting if stats else 0)
        yield self._waiting_by_reason(stats)
        yield self._gauge("kv_cache_usage_perc", "Used part of the KV cache, 0 to 1.", in_use)
        for name, text, value in (
            ("num_preemptions", "Requests preempted.", stats.num_preemptions if stats else 0),
            ("prefix_cache_queries", "Tokens looked up in the prefix cache.", stats.num_prefix_queries if stats else 0),
            ("prefix_cache_hits", "Tokens found in the prefix cache.", stats.num_prefix_hits if stats else 0),
            ("spec_decode_num_drafts", "Steps of a stream with guessed tokens.", stats.num_drafts if stats else 0),
            ("spec_decode_num_draft_tokens", "Tokens guessed.", stats.num_draft_tokens if stats else 0),
            ("spec_decode_num_accepted_tokens", "Guesses that were right.", stats.num_accepted_tokens if stats else 0),
        ):
            counter = CounterMetricFamily(f"vllm:{name}", text, labels=list(self._names))
            counter.add_metric(list(self._names.values()), value)
            yield counter

    def _waiting_by_reason(self, stats: EngineStats | None) -> Metric:
        """vLLM's reasons: for want of memory, seats or budget; or held back although there is room."""
        deferred = stats.num_deferred if stats else 0
        text = "Requests that wait, by reason."
        gauge = GaugeMetricFamily("vllm:num_requests_waiting_by_reason", text, labels=[*self._names, "reason"])
        gauge.add_metric([*self._names.values(), "capacity"], (stats.num_waiting if stats else 0) - deferred)
        gauge.add_metric([*self._names.values(), "deferred"], deferred)
        return gauge

    def _gauge(self, name: str, text: str, value: float, labels: Mapping[str, str] | None = None) -> Metric:
        labels = {**self._names, **(labels or {})}
        gauge = GaugeMetricFamily(f"vllm:{name}", text, labels=list(labels))
        gauge.add_metric(list(labels.values()), value)
        return gauge


class TenantCollector(Collector):
    """State of the tenants in the engine, and of the config."""

    def __init__(self, label: TenantLabels, snapshot: Callable[[], Snapshot]) -> None:
        self._label = label
        self._snapshot = snapshot

    def collect(self) -> Iterable[Metric]:
        snapshot = self._snapshot()
        yield from self._collect_config(snapshot)
        yield from self._collect_tenants(snapshot.tenants)
        yield self._gauge(
            "attained_share",
            "Part of recent service that the tenant got.",
            {tenant_id: share.attained for tenant_id, share in snapshot.shares.items()},
        )
        yield self._gauge(
            "entitled_share",
            "Part of recent service that its weight gave it.",
            {tenant_id: share.entitled for tenant_id, share in snapshot.shares.items()},
        )
        audited = CounterMetricFamily(
            "evenhand_audited", "Requests that an audited limit would have refused.", labels=["tenant", "reason"]
        )
        counts: Counts[tuple[str, str]] = Counts()
        for tenant_id, reasons in snapshot.audited.items():
            counts.update({(self._label(tenant_id), reason): count for reason, count in reasons.items()})
        for labels, count in counts.items():
            audited.add_metric(labels, count)
        yield audited

    def _collect_tenants(self, tenants: Sequence[TenantStats]) -> Iterable[Metric]:
        yield self._gauge("running_requests", "Requests that run.", {t.tenant_id: t.num_running for t in tenants})
        yield self._gauge("waiting_requests", "Requests that wait.", {t.tenant_id: t.num_waiting for t in tenants})
        yield self._gauge("kv_blocks", "KV blocks held.", {t.tenant_id: t.num_kv_blocks for t in tenants})
        yield self._gauge(
            "service_ahead",
            "Service per weight beyond the virtual time, in units of price.",
            {t.tenant_id: t.ahead for t in tenants},
        )
        yield self._gauge(
            "service_lag",
            "Service per weight behind the tenant furthest ahead; 0 if it waits for nobody.",
            {t.tenant_id: t.lag for t in tenants},
            combine=max,
        )
        yield self._gauge(
            "service_lag_bound",
            "The most that service_lag may be now, but for what may not be preempted.",
            {t.tenant_id: t.lag_bound for t in tenants},
            combine=max,
        )
        yield self._counter("service", "Service in units of price.", {t.tenant_id: t.service for t in tenants})
        yield self._counter("preemptions", "Requests preempted.", {t.tenant_id: t.num_preemptions for t in tenants})

    def _gauge(
        self, name: str, text: str, values: Mapping[str, float], combine: Callable[[float, float], float] = add
    ) -> Metric:
        return self._fill(GaugeMetricFamily(f"evenhand_{name}", text, labels=["tenant"]), values, combine)

    def _counter(self, name: str, text: str, values: Mapping[str, float]) -> Metric:
        return self._fill(CounterMetricFamily(f"evenhand_{name}", text, labels=["tenant"]), values)

    def _fill(
        self,
        family: GaugeMetricFamily | CounterMetricFamily,
        values: Mapping[str, float],
        combine: Callable[[float, float], float] = add,
    ) -> Metric:
        """Values by tenant; those of tenants without a label of their own are combined into one."""
        sums: dict[str, float] = {}
        for tenant_id, value in values.items():
            label = self._label(tenant_id)
            sums[label] = combine(sums.get(label, 0.0), value)
        for label, value in sums.items():
            family.add_metric([label], value)
        return family

    def _collect_config(self, snapshot: Snapshot) -> Iterable[Metric]:
        info = InfoMetricFamily("evenhand_config", "The config in force.")
        info.add_metric([], {"digest": snapshot.config_digest, "source": snapshot.config_source})
        yield info
        backend = InfoMetricFamily("evenhand_backend", "What generates.")
        backend.add_metric([], {"backend": snapshot.backend})
        yield backend
        current = GaugeMetricFamily("evenhand_config_current", "0 if a newer config was rejected.")
        current.add_metric([], snapshot.config_is_current)
        yield current
        reloads = CounterMetricFamily("evenhand_config_reloads", "Configs by result.", labels=["result"])
        for result, count in snapshot.num_config_reloads.items():
            reloads.add_metric([result], count)
        yield reloads
