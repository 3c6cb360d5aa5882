"""Histograms that are fed several times by each request: plain counts, which become Prometheus' at a scrape."""

from bisect import bisect_left
from collections.abc import Iterable, Sequence

from prometheus_client import CollectorRegistry
from prometheus_client.core import HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString


class Histogram:
    """How often values came, by bucket."""

    __slots__ = ("_bounds", "_counts", "_sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        """`bounds`: highest value of each bucket but the last, which has none."""
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def add_to(self, family: HistogramMetricFamily, labels: Sequence[str]) -> None:
        family.add_metric(labels, cumulative(self._bounds, self._counts), self._sum)


class Histograms(Collector):
    """Those of one name, by their labels' values."""

    def __init__(
        self, name: str, text: str, labels: Sequence[str], bounds: Sequence[float], registry: CollectorRegistry
    ) -> None:
        self._name = name
        self._text = text
        self._labels = labels
        self._bounds = bounds
        self._histograms: dict[tuple[str, ...], Histogram] = {}
        registry.register(self)

    def of(self, *labels: str) -> Histogram:
        """The one of these labels, empty at first."""
        found = self._histograms.get(labels)
        if found is None:
            found = self._histograms[labels] = Histogram(self._bounds)
        return found

    def collect(self) -> Iterable[Metric]:
        family = HistogramMetricFamily(self._name, self._text, labels=self._labels)
        for labels, histogram in self._histograms.items():
            histogram.add_to(family, labels)
        yield family


def cumulative(bounds: Sequence[float], counts: Sequence[int]) -> list[tuple[str, float]]:
    """As Prometheus has them: each bucket counts the smaller ones too."""
    names = [*map(floatToGoString, bounds), "+Inf"]
    return [(name, float(sum(counts[: number + 1]))) for number, name in enumerate(names)]
