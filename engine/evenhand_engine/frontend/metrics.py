"""Metrics: what the server counts and measures, in Prometheus' terms.

Two registries: `vllm:*` names without tenants, for the public port and existing dashboards, and `evenhand_*` names by
tenant, for the admin port only. Label values are bounded: the first tenants seen keep their names, later ones count as
`other`. Histograms are fed as things happen; gauges and counters of the engine are read at the time of a scrape.
"""

from bisect import bisect_left
from collections.abc import Callable, Sequence

from prometheus_client import CollectorRegistry, Counter, disable_created_metrics, generate_latest

from evenhand_engine.frontend.histograms import Histogram, Histograms
from evenhand_engine.frontend.metrics_collector import PublicCollector, Snapshot, TenantCollector, TenantLabels
from evenhand_engine.frontend.token_meter import INTERVAL_BUCKETS, PublicTokens, TenantTokens, TokenMeters
from evenhand_engine.messages import EngineStats

_FIRST_TOKEN_BUCKETS = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
_REQUEST_BUCKETS = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0),
    *(120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
_STEP_TIME_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
_N_BUCKETS = (1.0, 2.0, 5.0, 10.0, 20.0)
_STEP_BUCKETS = (1, *(2**power for power in range(3, 15)))


def _count_buckets(largest: int) -> list[float]:
    """1, 2, 5, 10, 20, ... up to `largest`."""
    series = (digit * 10**power for power in range(10) for digit in (1, 2, 5))
    return [float(value) for value in series if value <= largest]


class Metrics:
    """All instruments of one server.

    Args:
        model_name: label of the `vllm:*` metrics.
        max_model_len: largest bucket of token counts.
        snapshot: read at each scrape.
    """

    def __init__(self, model_name: str, max_model_len: int, snapshot: Callable[[], Snapshot]) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]  # the times of creation, which would double the number of series
        self.label = TenantLabels()
        self.public_registry = CollectorRegistry()
        self.tenant_registry = CollectorRegistry()
        self._names = {"model_name": model_name, "engine": "0"}
        self._token_counts = _count_buckets(max_model_len)
        self._create_public()
        self._create_tenant()
        self.tokens = TokenMeters()
        self.public_registry.register(PublicTokens(self._names, self.tokens))
        self.tenant_registry.register(TenantTokens(self.tokens))
        self.public_registry.register(PublicCollector(self._names, snapshot))
        self.tenant_registry.register(TenantCollector(self.label, snapshot))

    def _create_public(self) -> None:
        def histogram(name: str, text: str, buckets: Sequence[float]) -> Histogram:
            family = Histograms(f"vllm:{name}", text, tuple(self._names), buckets, self.public_registry)
            return family.of(*self._names.values())

        self.time_to_first_token = histogram("time_to_first_token_seconds", "To the first token.", _FIRST_TOKEN_BUCKETS)
        self.time_per_output_token = histogram(
            "request_time_per_output_token_seconds", "Mean time per token after the first.", INTERVAL_BUCKETS
        )
        self.request_latency = histogram("e2e_request_latency_seconds", "Arrival to end.", _REQUEST_BUCKETS)
        self.queue_time = histogram("request_queue_time_seconds", "Arrival to first step.", _REQUEST_BUCKETS)
        self.inference_time = histogram("request_inference_time_seconds", "First step to end.", _REQUEST_BUCKETS)
        self.prefill_time = histogram("request_prefill_time_seconds", "First step to first token.", _REQUEST_BUCKETS)
        self.decode_time = histogram("request_decode_time_seconds", "First token to end.", _REQUEST_BUCKETS)
        self.prompt_tokens = histogram("request_prompt_tokens", "Tokens of a prompt.", self._token_counts)
        self.generation_tokens = histogram("request_generation_tokens", "Tokens of an output.", self._token_counts)
        self.max_generation_tokens = histogram(
            "request_max_num_generation_tokens", "Tokens of a request's longest output.", self._token_counts
        )
        self.max_tokens = histogram("request_params_max_tokens", "Output limit of a request.", self._token_counts)
        self.params_n = histogram("request_params_n", "Outputs asked of a request.", _N_BUCKETS)
        self.request_preemptions = histogram("request_num_preemptions", "Preemptions of a request.", _N_BUCKETS)
        self.iteration_tokens = histogram("iteration_tokens_total", "Tokens of one step.", _STEP_BUCKETS)
        self.successes = Counter(
            "vllm:request_success",
            "Requests that ended, by reason.",
            (*self._names, "finished_reason"),
            registry=self.public_registry,
        )

        self.queue_rejections = Counter(
            "vllm:admission_rejections",
            "Requests refused because the queue is full.",
            ("model_name", "reason"),
            registry=self.public_registry,
        )

    def _create_tenant(self) -> None:
        def histograms(name: str, text: str, buckets: Sequence[float]) -> Histograms:
            return Histograms(f"evenhand_{name}", text, ("tenant",), buckets, self.tenant_registry)

        self.tenant_first_token = histograms("time_to_first_token_seconds", "To the first token.", _FIRST_TOKEN_BUCKETS)
        self.tenant_queue_time = histograms("queue_time_seconds", "Arrival to first step.", _REQUEST_BUCKETS)
        self.step_time = Histograms(
            "evenhand_step_seconds", "Duration of one step.", (), _STEP_TIME_BUCKETS, self.tenant_registry
        ).of()
        self.tenant_requests = Counter(
            "evenhand_requests",
            "Prompts that were handed to the engine, by outcome (finished, refused, aborted, failed) and reason.",
            ("tenant", "outcome", "reason"),
            registry=self.tenant_registry,
        )
        self.refusals = Counter(
            "evenhand_refusals", "Refused requests by reason.", ("tenant", "reason"), registry=self.tenant_registry
        )
        self.stalled = Counter(
            "evenhand_stalled_clients",
            "Connections that were ended because the client did not read its answer.",
            ("tenant",),
            registry=self.tenant_registry,
        )

    def observe_stats(self, stats: EngineStats) -> None:
        """Take in what the steps since the last report were."""
        for num_tokens in stats.step_tokens:
            self.iteration_tokens.observe(num_tokens)
        for seconds in stats.step_seconds:
            self.step_time.observe(seconds)

    def count_refusal(self, tenant_id: str, code: str) -> None:
        if code == "queue_full":
            self.queue_rejections.labels(self._names["model_name"], "max_num_queued_reqs").inc()
        self.refusals.labels(self.label(tenant_id), code).inc()

    def count_stalled(self, tenant_id: str) -> None:
        self.stalled.labels(self.label(tenant_id)).inc()

    def count_success(self, reason: str) -> None:
        self.successes.labels(*self._names.values(), reason).inc()

    def public_text(self) -> bytes:
        """The `vllm:*` metrics in Prometheus' text format."""
        return generate_latest(self.public_registry)

    def admin_text(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self.public_registry) + generate_latest(self.tenant_registry)


class RequestMetrics:
    """Follows one request: call `start`, `take_tokens` and `end` as they happen, at times of one monotonic clock."""

    __slots__ = (
        "_arrived_at",
        "_first_token_at",
        "_last_token_at",
        "_max_tokens",
        "_meter",
        "_metrics",
        "_num_choices",
        "_num_prompt_tokens",
        "_num_tokens",
        "_started_at",
        "_tenant",
    )

    def __init__(
        self,
        metrics: Metrics,
        tenant_id: str,
        num_prompt_tokens: int,
        max_tokens: int,
        now: float,
        num_choices: int | None = 1,
    ) -> None:
        """`num_choices`: of its prompt, told of the first one alone; None: another choice."""
        self._metrics = metrics
        self._tenant = metrics.label(tenant_id)
        self._meter = metrics.tokens.meter(self._tenant)
        self._num_prompt_tokens = num_prompt_tokens
        self._max_tokens = max_tokens
        self._num_choices = num_choices
        self._arrived_at = now
        self._started_at: float | None = None
        self._first_token_at: float | None = None
        self._last_token_at = now
        self._num_tokens = 0

    def start(self, num_cached_tokens: int, now: float) -> None:
        if self._started_at is not None:
            return
        self._started_at = now
        metrics, waited = self._metrics, now - self._arrived_at
        metrics.queue_time.observe(waited)
        metrics.tenant_queue_time.of(self._tenant).observe(waited)
        self._meter.num_prompt += self._num_prompt_tokens
        self._meter.num_cached += num_cached_tokens

    def take_tokens(self, num_tokens: int, now: float) -> None:
        if num_tokens == 0:
            return
        meter = self._meter
        if self._first_token_at is None:
            self._first_token_at = now
            metrics = self._metrics
            metrics.time_to_first_token.observe(now - self._arrived_at)
            metrics.tenant_first_token.of(self._tenant).observe(now - self._arrived_at)
        else:
            interval = now - self._last_token_at
            meter.intervals[bisect_left(INTERVAL_BUCKETS, interval)] += 1
            meter.interval_seconds += interval
        self._last_token_at = now
        self._num_tokens += num_tokens
        meter.num_generated += num_tokens

    def end(self, outcome: str, reason: str, num_preemptions: int, now: float) -> None:
        """`outcome`: finished, refused, aborted or failed; `reason`: a finish reason or a refusal's code."""
        metrics = self._metrics
        metrics.tenant_requests.labels(self._tenant, outcome, reason).inc()
        metrics.count_success({"finished": reason, "aborted": "abort"}.get(outcome, "error"))
        metrics.request_latency.observe(now - self._arrived_at)
        metrics.prompt_tokens.observe(self._num_prompt_tokens)
        metrics.generation_tokens.observe(self._num_tokens)
        metrics.max_generation_tokens.observe(self._num_tokens)
        if self._num_choices is not None:
            metrics.params_n.observe(self._num_choices)
        metrics.request_preemptions.observe(num_preemptions)
        metrics.max_tokens.observe(self._max_tokens)
        if self._started_at is not None:
            metrics.inference_time.observe(now - self._started_at)
            if self._first_token_at is not None:
                metrics.prefill_time.observe(self._first_token_at - self._started_at)
                metrics.decode_time.observe(now - self._first_token_at)
                if self._num_tokens > 1:
                    mean = (self._last_token_at - self._first_token_at) / (self._num_tokens - 1)
                    metrics.time_per_output_token.observe(mean)
