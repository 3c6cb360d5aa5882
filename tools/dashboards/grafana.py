"""Grafana's dashboards, written from the panels: `python -m dashboards.grafana FOLDER` (`make dashboards`) writes a file for each."""

import json
import sys
from pathlib import Path
from typing import Any

from dashboards.panels import DASHBOARDS, SELECTOR, Dashboard, Panel

Json = dict[str, Any]

SOURCE = {"type": "prometheus", "uid": "${datasource}"}
WIDTH, HEIGHT, COLUMNS = 12, 8, 24


def rendered(dashboard: Dashboard) -> str:
    """The dashboard as Grafana reads it."""
    document: Json = {
        "uid": dashboard.uid,
        "title": dashboard.title,
        "tags": ["evenhand"],
        "schemaVersion": 39,
        "refresh": "30s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": [_source(), *(_variable(*each) for each in dashboard.variables)]},
        "panels": [_panel(number, panel) for number, panel in enumerate(dashboard.panels)],
    }
    return json.dumps(document, indent=1) + "\n"


def _source() -> Json:
    return {"name": "datasource", "label": "Source", "type": "datasource", "query": "prometheus"}


def _variable(name: str, query: str) -> Json:
    variable: Json = {
        "name": name,
        "label": name.capitalize(),
        "type": "query",
        "datasource": SOURCE,
        "query": query.replace("SELECTOR", SELECTOR),
        "refresh": 2,
        "sort": 1,
    }
    if name == "tenant":
        variable |= {"multi": True, "includeAll": True, "allValue": ".*", "current": {"text": "All", "value": "$__all"}}
    return variable


def _panel(number: int, panel: Panel) -> Json:
    per_row = COLUMNS // WIDTH
    return {
        "id": number + 1,
        "type": "timeseries",
        "title": panel.title,
        "description": panel.description,
        "datasource": SOURCE,
        "gridPos": {"x": number % per_row * WIDTH, "y": number // per_row * HEIGHT, "w": WIDTH, "h": HEIGHT},
        "fieldConfig": {"defaults": {"unit": panel.unit, "custom": {"fillOpacity": 5}}, "overrides": []},
        "options": {"legend": {"displayMode": "list"}, "tooltip": {"mode": "multi", "sort": "desc"}},
        "targets": [
            {"refId": chr(ord("A") + index), "expr": expression.replace("SELECTOR", SELECTOR), "legendFormat": legend}
            for index, (expression, legend) in enumerate(panel.queries)
        ],
    }


def main(folder: str) -> None:
    """Writes a file for each dashboard."""
    for dashboard in DASHBOARDS:
        Path(folder, f"{dashboard.uid}.json").write_text(rendered(dashboard))


if __name__ == "__main__":
    main(*sys.argv[1:])
