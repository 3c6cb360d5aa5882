"""What is counted plainly reads as what Prometheus' own histograms would say."""

import random

from prometheus_client import CollectorRegistry, Histogram, disable_created_metrics, generate_latest

from evenhand_engine.frontend.histograms import Histograms

BOUNDS = (0.001, 0.25, 1.0, 2.0, 50.0, 2_000_000.0)


def test_the_same_values_give_the_same_text() -> None:
    disable_created_metrics()  # type: ignore[no-untyped-call]
    rng = random.Random(0)
    theirs, ours = CollectorRegistry(), CollectorRegistry()
    for labels in ((), ("tenant",), ("model_name", "engine")):
        name = f"evenhand_{len(labels)}_seconds"
        expected = Histogram(name, "Some text.", labels, registry=theirs, buckets=BOUNDS)
        histograms = Histograms(name, "Some text.", labels, BOUNDS, ours)
        for _ in range(200):
            values = [rng.choice("ab") for _ in labels]
            value = rng.choice([*BOUNDS, rng.uniform(0, 60), 10 ** rng.uniform(-4, 7)])
            (expected.labels(*values) if labels else expected).observe(value)
            histograms.of(*values).observe(value)
        assert generate_latest(ours) == generate_latest(theirs)
