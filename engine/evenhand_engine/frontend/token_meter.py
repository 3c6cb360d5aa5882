"""TokenMeters: tokens by tenant and the times between them. Counted for every token, so kept plain and read at a scrape.

What all tenants have together is added up then, not counted beside.
"""

from collections.abc import Iterable, Mapping

from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from evenhand_engine.frontend.histograms import cumulative

INTERVAL_BUCKETS = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)


class TokenMeter:
    """Tokens of one tenant, or of all that share a label.

    Attributes:
        num_prompt, num_cached, num_generated: tokens.
        intervals: by bucket, how many times between two arrivals of a request's tokens; the last one has no end.
        interval_seconds: their sum.
    """

    __slots__ = ("interval_seconds", "intervals", "num_cached", "num_generated", "num_prompt")

    def __init__(self) -> None:
        self.num_prompt = 0
        self.num_cached = 0
        self.num_generated = 0
        self.intervals = [0] * (len(INTERVAL_BUCKETS) + 1)
        self.interval_seconds = 0.0


class TokenMeters:
    """The meters of all tenants, by their labels."""

    def __init__(self) -> None:
        self._meters: dict[str, TokenMeter] = {}

    def meter(self, label: str) -> TokenMeter:
        return self._meters.setdefault(label, TokenMeter())

    def items(self) -> list[tuple[str, TokenMeter]]:
        return list(self._meters.items())


class PublicTokens(Collector):
    """Tokens of all tenants together, under vLLM's names."""

    def __init__(self, names: Mapping[str, str], meters: TokenMeters) -> None:
        self._names = names
        self._meters = meters

    def collect(self) -> Iterable[Metric]:
        meters = [meter for _, meter in self._meters.items()]
        labels, values = list(self._names), list(self._names.values())
        for name, text, count in (
            ("prompt_tokens", "Prompt tokens of requests that have started.", sum(m.num_prompt for m in meters)),
            ("prompt_tokens_cached", "Of these, found in the prefix cache.", sum(m.num_cached for m in meters)),
            ("generation_tokens", "Tokens generated.", sum(m.num_generated for m in meters)),
        ):
            family = CounterMetricFamily(f"vllm:{name}", text, labels=labels)
            family.add_metric(values, count)
            yield family
        histogram = HistogramMetricFamily("vllm:inter_token_latency_seconds", "Between tokens.", labels=labels)
        counts = [sum(column) for column in zip(*(m.intervals for m in meters), strict=True)] or TokenMeter().intervals
        histogram.add_metric(values, cumulative(INTERVAL_BUCKETS, counts), sum(m.interval_seconds for m in meters))
        yield histogram


class TenantTokens(Collector):
    """The same by tenant."""

    def __init__(self, meters: TokenMeters) -> None:
        self._meters = meters

    def collect(self) -> Iterable[Metric]:
        text = "Tokens by kind: prompt, cached (of the prompt, found in the prefix cache), generation."
        tokens = CounterMetricFamily("evenhand_tokens", text, labels=["tenant", "kind"])
        intervals = HistogramMetricFamily("evenhand_inter_token_latency_seconds", "Between tokens.", labels=["tenant"])
        for label, meter in self._meters.items():
            tokens.add_metric([label, "prompt"], meter.num_prompt)
            tokens.add_metric([label, "cached"], meter.num_cached)
            tokens.add_metric([label, "generation"], meter.num_generated)
            intervals.add_metric([label], cumulative(INTERVAL_BUCKETS, meter.intervals), meter.interval_seconds)
        yield tokens
        yield intervals
