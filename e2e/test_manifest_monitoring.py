"""Monitors scrape ports that are there, and alerts ask for metrics that the programs have."""

import re
from pathlib import Path
from typing import Any

import pytest

from cluster import build
from evenhand_policy.push_protocol import ConfigSource
from harness.kustomize import render

REPOSITORY = build.SOURCES.parents[1]
Object = dict[str, Any]


@pytest.fixture
def rendered(tmp_path: Path) -> list[Object]:
    """The dev overlay with the component."""
    return render(tmp_path, "monitoring")


def of_kind(rendered: list[Object], kind: str) -> dict[str, Object]:
    """Objects by name."""
    return {each["metadata"]["name"]: each for each in rendered if each["kind"] == kind}


def test_monitors_select_what_runs_and_scrape_ports_that_it_has(rendered: list[Object]) -> None:
    engines = of_kind(rendered, "Deployment")["evenhand-engine"]["spec"]["template"]
    monitor = of_kind(rendered, "PodMonitor")["evenhand-engine"]["spec"]
    assert monitor["selector"]["matchLabels"].items() <= engines["metadata"]["labels"].items()
    [endpoint] = monitor["podMetricsEndpoints"]
    assert endpoint["port"] in [port["name"] for port in engines["spec"]["containers"][0]["ports"]]
    service = of_kind(rendered, "Service")["evenhand-operator"]
    monitor = of_kind(rendered, "ServiceMonitor")["evenhand-operator"]["spec"]
    assert monitor["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
    assert monitor["endpoints"][0]["port"] in [port["name"] for port in service["spec"]["ports"]]


def test_alerts_ask_for_metrics_that_there_are(rendered: list[Object]) -> None:
    code = "".join(
        path.read_text() for folder in ("operator", "engine") for path in (REPOSITORY / folder).rglob("*.py")
    )
    groups = of_kind(rendered, "PrometheusRule")["evenhand"]["spec"]["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    asked = {name for rule in rules for name in re.findall(r"\bevenhand_[a-z_]+\b", rule["expr"])}
    assert len(asked) > 6
    for name in asked:
        stem = re.sub("^evenhand_|_(total|info)$", "", name)
        assert re.search(rf"[\"'](?:evenhand_)?{stem}[\"']", code), name


def test_every_alert_says_what_is_the_matter_and_how_bad_it_is(rendered: list[Object]) -> None:
    groups = of_kind(rendered, "PrometheusRule")["evenhand"]["spec"]["groups"]
    for rule in (rule for group in groups for rule in group["rules"]):
        assert rule["annotations"]["summary"]
        assert rule["labels"]["severity"] in ("info", "warning", "critical")


def test_engine_without_config_is_told_by_the_engines_own_word_for_it(rendered: list[Object]) -> None:
    groups = of_kind(rendered, "PrometheusRule")["evenhand"]["spec"]["groups"]
    [rule] = [rule for group in groups for rule in group["rules"] if rule["alert"] == "EvenhandEngineWithoutConfig"]
    assert f'source="{ConfigSource.BUILT_IN}"' in rule["expr"]
