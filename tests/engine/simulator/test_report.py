"""What a report says of a run whose figures are known."""

from array import array
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from evenhand_engine.errors import StartupError
from evenhand_engine.simulator.measures import RequestRecord
from evenhand_engine.simulator.report import plot_service, report_of, summary_table, tenant_table
from evenhand_engine.simulator.simulation import Run, StepLog
from evenhand_policy.config import SchedulerConfig, Slo, TenantConfig, UnknownTenants

CONFIG = SchedulerConfig(
    tenants=(TenantConfig(tenant_id="a", weight=3, slo=Slo(time_to_first_token_ms=1_500, inter_token_latency_ms=500)),),
    unknown_tenants=UnknownTenants(weight=2),
)


def record(tenant: str, arrival: float, times: list[float], **more: object) -> RequestRecord:
    return RequestRecord(tenant, arrival, 10, len(times), times[0], times[-1], np.array(times), **more)  # type: ignore[arg-type]


def run(*records: RequestRecord) -> Run:
    return Run(list(records), StepLog(array("d", [0.0]), array("d", [1.0]), []), end_time=100.0)


RUN = run(
    record("a", 0.0, [1.0, 1.4, 1.8], num_preemptions=2),
    record("a", 10.0, [12.0, 12.4, 13.4]),
    record("b", 20.0, [21.0]),
    RequestRecord("a", 100.0, 10, 5),
)


def test_figures_by_tenant() -> None:
    ours, others = report_of("fair", RUN, CONFIG).tenants
    assert (ours.tenant_id, ours.weight, ours.num_requests, ours.num_served) == ("a", 3, 3, 2)
    assert ours.ttft_p50_s == pytest.approx(1.5)
    assert ours.itl_p50_s == pytest.approx(0.4)
    assert ours.ttft_attainment == pytest.approx(1 / 3)  # 1.0 s; not 2.0 s; not the one that was never served
    assert ours.itl_attainment == pytest.approx(3 / 4)
    assert ours.num_preemptions == 2
    assert ours.service == 2 * (10 + 2 * 3)
    assert (others.weight, others.ttft_attainment, others.itl_p99_s) == (2, 1.0, None)


def test_figures_in_all() -> None:
    report = report_of("fair", RUN, CONFIG)
    assert (report.policy, report.num_requests, report.num_served, report.num_preemptions) == ("fair", 4, 3, 2)
    assert report.tokens_per_s == pytest.approx((13 + 13 + 11) / 21.0)


@pytest.mark.parametrize("records", [(), (RequestRecord("a", 0.0, 10, 5),)])
def test_a_run_that_served_nobody_has_a_report(records: tuple[RequestRecord, ...]) -> None:
    report = report_of("fair", run(*records), CONFIG)
    assert (report.num_served, report.max_difference, report.accumulated_gap, report.tokens_per_s) == (0, 0, 0, 0)
    assert report.jain_index == 1.0


def test_share_is_of_what_ideal_sharing_would_have_given() -> None:
    def burst(tenant: str, count: int) -> list[RequestRecord]:
        return [record(tenant, 0.0, [float(i), i + 0.5]) for i in range(count)]

    equal = report_of("fair", run(*burst("x", 100), *burst("y", 100)), CONFIG)
    assert [tenant.share_of_entitlement for tenant in equal.tenants] == pytest.approx([1.0, 1.0])
    assert equal.jain_index == pytest.approx(1.0)
    weighted = report_of("fair", run(*burst("a", 100), *burst("y", 100)), CONFIG)
    assert [t.share_of_entitlement for t in weighted.tenants] == pytest.approx([0.5 / 0.6, 0.5 / 0.4], rel=0.05)
    assert weighted.jain_index < 0.98


def test_tables_show_the_worst_off_of_many() -> None:
    report = report_of("fair", RUN, CONFIG)
    out = StringIO()
    Console(width=80, file=out).print(tenant_table(report, most=1), summary_table([report]))
    text = out.getvalue()
    assert "the 1 worst off of 2" in text
    assert "3/4" in text
    assert "\u2026" not in text, "80 columns must hold both tables"


def test_a_plot_is_a_picture(tmp_path: Path) -> None:
    plot_service(tmp_path / "run.png", {"fair": RUN, "fcfs": RUN})
    assert (tmp_path / "run.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    with pytest.raises(StartupError, match="cannot be written"):
        plot_service(tmp_path / "nowhere" / "run.png", {"fair": RUN})
