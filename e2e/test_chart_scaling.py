"""What KEDA is told to ask Prometheus, answered by Prometheus' own test runner: demand inside guarantees scales a pool, a flood does not."""

import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from harness.helm import Helm, setting

LABELS = 'namespace="inference",evenhand_dev_pool="default"'
KEDA = {"enabled": True, "maxReplicas": 8, "requestsPerEngine": 16, "maxTenantPercent": 50}
SEATS = 8 * 16

Tenants = dict[str, tuple[float, float, float]]
"""Requests that run and that wait, in both engines together, and the share that each engine entitles the tenant to."""


@pytest.mark.parametrize(
    ("tenants", "wanted"),
    [
        ({"chat": (4, 0, 0.5), "batch": (2, 0, 0.5)}, 6),
        ({"chat": (10, 0, 0.8), "batch": (22, 1000, 0.2)}, 10 + 0.2 * SEATS),
        ({"batch": (32, 1000, 1.0)}, 0.5 * SEATS),
        ({"chat": (10, 500, 0.5), "batch": (10, 500, 0.5)}, SEATS),
    ],
    ids=["all that there is", "a flood beside a tenant", "a flood alone", "two floods"],
)
def test_a_tenant_asks_for_no_more_than_its_share_of_all_engines(
    tmp_path: Path, tenants: Tenants, wanted: float
) -> None:
    if not (promtool := shutil.which("promtool")):
        pytest.skip("no promtool (of Debian's package prometheus), by which the query is answered")
    objects = Helm(tmp_path).template(*setting(poolDefaults__keda=KEDA))
    [scaled] = [each["spec"] for each in objects if each["kind"] == "ScaledObject"]
    [trigger] = scaled["triggers"]
    assert trigger["metadata"]["threshold"] == "16", "seats of one engine"
    series = [(f'evenhand_config_current{{{LABELS},pod="{pod}"}}', 1.0) for pod in "ab"]
    for tenant, (running, waiting, entitled) in tenants.items():
        for pod in "ab":
            of_pod = f'{{{LABELS},pod="{pod}",tenant="{tenant}"}}'
            series += [
                (f"evenhand_running_requests{of_pod}", running / 2),
                (f"evenhand_waiting_requests{of_pod}", waiting / 2),
                (f"evenhand_entitled_share{of_pod}", entitled),
            ]
    asked = {
        "expr": trigger["metadata"]["query"],
        "eval_time": "5m",
        "exp_samples": [{"labels": "{}", "value": wanted}],
    }
    test = {
        "interval": "1m",
        "input_series": [{"series": name, "values": f"{value}+0x10"} for name, value in series],
        "promql_expr_test": [asked],
    }
    (tmp_path / "test.yaml").write_text(yaml.safe_dump({"rule_files": [], "tests": [test]}))
    done = subprocess.run([promtool, "test", "rules", "test.yaml"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
