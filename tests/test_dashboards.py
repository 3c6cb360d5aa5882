"""Dashboards, alerts and scalers ask for metrics and labels that operator and engines have: PromQL is parsed, metrics are made."""

import json
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import yaml
from prometheus_client.metrics import MetricWrapperBase
from prometheus_client.parser import text_string_to_metric_families

from dashboards.grafana import rendered
from dashboards.panels import DASHBOARDS, Dashboard, queries
from evenhand_engine.backends.backend import ModelInfo
from evenhand_engine.frontend.metrics import Metrics, RequestMetrics
from evenhand_engine.frontend.metrics_collector import Snapshot
from evenhand_engine.frontend.share_tracker import Share
from evenhand_operator import metrics as operator_metrics
from harness.stats import make_tenant_stats

ROOT = Path(__file__).parents[1]
MONITORING = ROOT / "manifests/components/monitoring"
OF_TARGETS = {"namespace", "pod", "job", "evenhand_dev_pool"}
"""Labels that Prometheus gives to what it scrapes by our monitors."""

Labels = dict[str, set[str]]


@pytest.fixture(scope="module")
def labels() -> Labels:
    """The labels of each series that engines and the operator show."""
    found: Labels = defaultdict(set)
    for family in text_string_to_metric_families(exposition()):
        for sample in family.samples:
            found[sample.name] |= sample.labels.keys()
    for metric in vars(operator_metrics).values():
        if isinstance(metric, MetricWrapperBase):
            [described] = metric.describe()
            names = set(metric._labelnames)
            match described.type:
                case "counter":
                    found[f"{described.name}_total"] = names
                case "histogram":
                    found[f"{described.name}_bucket"] = names | {"le"}
                case _:
                    found[described.name] = names
    return found


def exposition() -> str:
    """What an engine shows on its admin port when it has served a request."""
    info = ModelInfo(model_name="m", max_model_len=100)
    tenant = make_tenant_stats("t")
    shares = {"t": Share(attained=0.5, entitled=0.5)}
    snapshot = Snapshot(info, None, [tenant], shares, "sha256:x", "Push", True, {"applied": 1}, {"t": {"rate": 2}})
    metrics = Metrics("m", 100, lambda: snapshot)
    request = RequestMetrics(metrics, "t", 5, 7, 0.0)
    request.start(1, 1.0)
    request.take_tokens(1, 2.0)
    request.end("finished", "stop", 0, 3.0)
    metrics.count_refusal("t", "queue_full")
    return metrics.admin_text().decode()


def nodes(expression: Any) -> Iterator[Any]:
    """Every part of a parsed query."""
    yield expression
    inner = [getattr(expression, name, None) for name in ("expr", "lhs", "rhs", "vector_selector")]
    for part in [*inner, *getattr(expression, "args", [])]:
        if part is not None:
            yield from nodes(part)


def check(query: str, labels: Labels) -> int:
    """Every metric is there, with every label by which it is selected or grouped; the number of metrics."""
    asked = [part for part in nodes(promql_parser.parse(query)) if isinstance(part, promql_parser.VectorSelector)]
    known = set(OF_TARGETS)
    for selector in asked:
        assert selector.name in labels, selector.name
        matched = {matcher.name for matcher in selector.matchers.matchers}
        assert matched <= labels[selector.name] | OF_TARGETS, (selector.name, matched)
        known |= labels[selector.name]
    for names in re.findall(r"\bby \(([^)]*)\)", query):
        assert set(names.replace(" ", "").split(",")) <= known, names
    return len(asked)


@pytest.mark.parametrize("dashboard", DASHBOARDS, ids=lambda each: each.uid)
def test_panels_ask_for_what_there_is(dashboard: Dashboard, labels: Labels) -> None:
    choices = [query for _, query in dashboard.variables]
    assert all(re.match(r"label_values\(([a-z_]+)", query)[1] in labels for query in choices)  # type: ignore[index]
    for query in queries(dashboard):
        assert check(query.replace("$__rate_interval", "5m"), labels) > 0


@pytest.mark.parametrize("dashboard", DASHBOARDS, ids=lambda each: each.uid)
def test_files_are_those_of_the_panels(dashboard: Dashboard) -> None:
    text = (MONITORING / f"dashboards/{dashboard.uid}.json").read_text()
    assert text == rendered(dashboard), "run `make dashboards` and commit what it writes"
    document = json.loads(text)
    assert len({json.dumps(panel["gridPos"]) for panel in document["panels"]}) == len(dashboard.panels)
    named = {each["name"] for each in document["templating"]["list"]}
    used = set(re.findall(r"\$\{?([a-z]+)\b", text))
    assert used <= named, "every variable can be chosen"


@pytest.mark.parametrize("dashboard", DASHBOARDS, ids=lambda each: each.uid)
def test_legends_name_labels_that_the_query_keeps(dashboard: Dashboard) -> None:
    for panel in dashboard.panels:
        for query, legend in panel.queries:
            kept = set(",".join(re.findall(r"\bby \(([^)]*)\)", query)).replace(" ", "").split(","))
            if " by (" in query:
                assert set(re.findall(r"{{(\w+)}}", legend)) <= kept, panel.title


def test_alerts_ask_for_what_there_is(labels: Labels) -> None:
    groups = yaml.safe_load((MONITORING / "alerts.yaml").read_text())["spec"]["groups"]
    assert sum(check(rule["expr"], labels) for group in groups for rule in group["rules"]) > 6


def test_what_must_be_seen_is_seen() -> None:
    """Share beside entitlement, queue, latency, memory, lag beside its bound, pushes."""
    text = "".join(query for dashboard in DASHBOARDS for query in queries(dashboard))
    for metric in (
        "evenhand_attained_share",
        "evenhand_entitled_share",
        "evenhand_waiting_requests",
        "evenhand_time_to_first_token_seconds_bucket",
        "evenhand_inter_token_latency_seconds_bucket",
        "evenhand_kv_blocks",
        "evenhand_service_lag_bound",
        "evenhand_operator_push_seconds_bucket",
        "evenhand_operator_push_errors_total",
    ):
        assert metric in text
