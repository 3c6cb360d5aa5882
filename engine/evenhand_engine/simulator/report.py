"""Report: a run's figures by tenant and in all, as data, as a table and as plots."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec
import numpy as np
from rich import box
from rich.table import Table

from evenhand_engine.errors import StartupError
from evenhand_engine.simulator.fluid import FluidShare
from evenhand_engine.simulator.measures import (
    Delivery,
    FloatArray,
    RequestRecord,
    Windows,
    accumulated_gap,
    cumulative_service,
    jain_index,
    service_difference,
    share_of_entitlement,
    slo_attainment,
    tenant_ids,
    throughput,
)
from evenhand_engine.simulator.simulation import Run
from evenhand_policy.config import DEFAULT_TENANT_ID, SchedulerConfig, Slo

NUM_WINDOWS = 20


class TenantReport(msgspec.Struct, frozen=True, kw_only=True):
    """One tenant. Times in seconds, None where no request got that far; `service` in units of price.

    `share_of_entitlement`: service during contention (`windows_of`) over what ideal sharing of the same capacity would
    have given.
    `ttft_attainment`, `itl_attainment`: share of requests, and of gaps between tokens, within the objective.
    """

    tenant_id: str
    weight: int
    num_requests: int
    num_served: int
    ttft_p50_s: float | None
    ttft_p95_s: float | None
    ttft_p99_s: float | None
    itl_p50_s: float | None
    itl_p99_s: float | None
    service: float
    share_of_entitlement: float
    ttft_attainment: float
    itl_attainment: float
    num_preemptions: int


class RunReport(msgspec.Struct, frozen=True, kw_only=True):
    """All tenants together. `*_true` are by token times, the others spread each request's service evenly."""

    policy: str
    num_requests: int
    num_served: int
    seconds: float
    num_steps: int
    tokens_per_s: float
    max_difference: float
    mean_difference: float
    max_difference_true: float
    mean_difference_true: float
    accumulated_gap: float
    jain_index: float
    num_preemptions: int
    tenants: tuple[TenantReport, ...]


def windows_of(run: Run) -> Windows:
    """The published windows, scaled to the time of contention: until the last arrival, at least half of the run."""
    duration = max([run.end_time / 2, *(record.arrival_time for record in run.records)])
    return Windows(duration=duration, warmup=0.05 * duration, width=0.1 * duration, count=NUM_WINDOWS)


def report_of(policy: str, run: Run, config: SchedulerConfig) -> RunReport:
    """The figures of `run`. A tenant that `config` does not know counts with the weight of unknown tenants."""
    records, windows = run.records, windows_of(run)
    served = [record for record in records if record.is_served]
    weights = _weights(records, config)
    spread = service_difference(records, windows)
    true = service_difference(records, windows, Delivery.TOKENS)
    tenants = _tenant_reports(records, windows.duration, weights, config)
    return RunReport(
        policy=policy,
        num_requests=len(records),
        num_served=len(served),
        seconds=run.end_time,
        num_steps=len(run.steps.shapes),
        tokens_per_s=throughput(records),
        max_difference=spread.maximum,
        mean_difference=spread.mean,
        max_difference_true=true.maximum,
        mean_difference_true=true.mean,
        accumulated_gap=accumulated_gap(records, windows, Delivery.TOKENS),
        jain_index=jain_index([tenant.share_of_entitlement for tenant in tenants]),
        num_preemptions=sum(record.num_preemptions for record in records),
        tenants=tenants,
    )


def _weights(records: Sequence[RequestRecord], config: SchedulerConfig) -> dict[str, int]:
    known = {tenant.tenant_id: tenant.weight for tenant in config.tenants}
    fallback = known.get(DEFAULT_TENANT_ID, config.unknown_tenants.weight)
    return {tenant: known.get(tenant, fallback) for tenant in tenant_ids(records)}


def _tenant_reports(
    records: Sequence[RequestRecord], until: float, weights: Mapping[str, int], config: SchedulerConfig
) -> tuple[TenantReport, ...]:
    tenants, at = tenant_ids(records), np.array([until])
    begun = [record for record in records if record.token_times is not None]
    received = cumulative_service(begun, tenants, at, Delivery.TOKENS)[:, 0]
    capacity = float(received.sum()) / until
    entitled = FluidShare(records, max(capacity, 1e-9), weights).cumulative_service(tenants, at)[:, 0]
    shares = share_of_entitlement(received, entitled)
    slos = {tenant.tenant_id: tenant.slo for tenant in config.tenants}
    own: dict[str, list[RequestRecord]] = {tenant: [] for tenant in tenants}
    for record in records:
        own[record.tenant_id].append(record)
    return tuple(
        _tenant_report(tenant, own[tenant], weights[tenant], slos.get(tenant, Slo()), float(share))
        for tenant, share in zip(tenants, shares, strict=True)
    )


def _tenant_report(
    tenant_id: str, records: Sequence[RequestRecord], weight: int, slo: Slo, share: float
) -> TenantReport:
    waits = [r.first_token_time - r.arrival_time for r in records if r.first_token_time is not None]
    gaps = gaps_of(records)
    return TenantReport(
        tenant_id=tenant_id,
        weight=weight,
        num_requests=len(records),
        num_served=sum(record.is_served for record in records),
        ttft_p50_s=percentile(waits, 50),
        ttft_p95_s=percentile(waits, 95),
        ttft_p99_s=percentile(waits, 99),
        itl_p50_s=percentile(gaps, 50),
        itl_p99_s=percentile(gaps, 99),
        service=float(sum(record.cost for record in records if record.is_served)),
        share_of_entitlement=share,
        ttft_attainment=_attainment(waits, slo.time_to_first_token_ms, len(records) - len(waits)),
        itl_attainment=_attainment(gaps, slo.inter_token_latency_ms, 0),
        num_preemptions=sum(record.num_preemptions for record in records),
    )


def gaps_of(records: Sequence[RequestRecord]) -> FloatArray:
    """Seconds between consecutive tokens of the same request, of all of them."""
    gaps = [np.diff(record.token_times) for record in records if record.token_times is not None]
    return np.concatenate(gaps) if gaps else np.empty(0)


def percentile(values: Sequence[float] | FloatArray, percent: float) -> float | None:
    """None for no values."""
    return float(np.percentile(values, percent)) if len(values) else None


def _attainment(values: Sequence[float] | FloatArray, objective_ms: int | None, num_missing: int) -> float:
    return 1.0 if objective_ms is None else slo_attainment(values, objective_ms / 1000, num_missing)


def summary_table(reports: Sequence[RunReport]) -> Table:
    """One row for each policy."""
    table = Table(
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        title="Policies (difference: spread evenly, by true token times)",
        title_justify="left",
    )
    table.add_column("policy", min_width=8)
    for heading in ("max\ndiff", "mean\ndiff", "max\ntrue", "mean\ntrue", "tok/s", "served", "Jain", "preempted"):
        table.add_column(heading, justify="right")
    for report in reports:
        table.add_row(
            report.policy,
            f"{report.max_difference:,.0f}",
            f"{report.mean_difference:,.0f}",
            f"{report.max_difference_true:,.0f}",
            f"{report.mean_difference_true:,.0f}",
            f"{report.tokens_per_s:,.0f}",
            f"{report.num_served:,}/{report.num_requests:,}",
            f"{report.jain_index:.3f}",
            f"{report.num_preemptions:,}",
        )
    return table


def tenant_table(report: RunReport, most: int = 40) -> Table:
    """One row for each tenant; of more than `most`, those with the smallest share of their entitlement."""
    tenants = sorted(report.tenants, key=lambda tenant: tenant.share_of_entitlement)[:most]
    hidden = len(report.tenants) - len(tenants)
    title = f"Tenants under {report.policy}" + (f" (the {most} worst off of {len(report.tenants)})" if hidden else "")
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), title=title, title_justify="left")
    table.add_column("tenant", min_width=8)
    headings = ("TTFT s\np50/p99", "ITL ms\np50/p99", "in SLO %\nTTFT/ITL", "pre-\nempted")
    for heading in ("weight", "served", "service", "share", *headings):
        table.add_column(heading, justify="right", no_wrap=True)  # long names wrap, figures never
    for tenant in sorted(tenants, key=lambda tenant: tenant.tenant_id):
        table.add_row(
            tenant.tenant_id,
            str(tenant.weight),
            f"{tenant.num_served:,}/{tenant.num_requests:,}",
            f"{tenant.service / 1_000:,.0f}k",
            f"{tenant.share_of_entitlement:.0%}",
            f"{_seconds(tenant.ttft_p50_s)}/{_seconds(tenant.ttft_p99_s)}",
            f"{_milliseconds(tenant.itl_p50_s)}/{_milliseconds(tenant.itl_p99_s)}",
            f"{100 * tenant.ttft_attainment:.0f}/{100 * tenant.itl_attainment:.0f}",
            f"{tenant.num_preemptions:,}",
        )
    return table


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}" if value < 10 else f"{value:.0f}"


def _milliseconds(value: float | None) -> str:
    return "-" if value is None else f"{1_000 * value:.0f}"


def plot_service(path: Path, runs: Mapping[str, Run], most: int = 6) -> None:
    """Write a picture: for each policy, the service rate of the busiest tenants over time, as a moving mean.

    Raises:
        StartupError: matplotlib is not installed, or the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise StartupError("plots need matplotlib: pip install matplotlib") from error
    figure = Figure(figsize=(10, 3 * len(runs)), layout="constrained")
    axes = figure.subplots(len(runs), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    cost: Counter[str] = Counter()
    for record in (record for run in runs.values() for record in run.records if record.token_times is not None):
        cost[record.tenant_id] += record.cost
    busiest = [tenant for tenant, _ in cost.most_common(most)]
    end_time = max(run.end_time for run in runs.values())
    times, width = np.linspace(0.0, end_time, 241), end_time / NUM_WINDOWS
    starts, ends = np.maximum(times - width / 2, 0.0), times + width / 2
    for axis, (policy, run) in zip(axes, runs.items(), strict=True):
        mine = [r for r in run.records if r.token_times is not None and r.tenant_id in busiest]
        service = [cumulative_service(mine, busiest, at, Delivery.TOKENS) for at in (starts, ends)]
        for tenant, rate in zip(busiest, (service[1] - service[0]) / (ends - starts), strict=True):
            axis.plot(times, rate, label=tenant, linewidth=1.5)
        axis.set_title(policy, loc="left")
        axis.set_ylabel(f"service / s, mean of {width:.0f} s")
        axis.grid(alpha=0.3)
    axes[0].legend(loc="upper right", ncols=4, fontsize="small")
    axes[-1].set_xlabel("seconds")
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        raise StartupError(f"{path}: cannot be written: {error}") from error
