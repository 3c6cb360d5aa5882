"""`evenhand simulate`: a trace or a named workload through the engine's own scheduler, in virtual time."""

import math
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from evenhand_engine.simulator.report import RunReport
    from evenhand_engine.simulator.scenario import Scenario
    from evenhand_engine.simulator.sidecar import SidecarFaults


class Name(click.ParamType[str]):
    """One of some names, which are loaded only when an argument or the help needs them."""

    name = "name"

    def __init__(self, load: Callable[[], Iterable[str]], accepts: Callable[[str], bool] | None = None) -> None:
        self._load = load
        self._accepts = accepts

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str:
        return f"[{'|'.join(self._load())}]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        names = tuple(self._load())
        if not (self._accepts(value) if self._accepts else value in names):
            self.fail(f"{value!r} is none of {', '.join(names)}.", param, ctx)
        return str(value)


def _workloads() -> Iterable[str]:
    from evenhand_engine.simulator.workloads import WORKLOADS

    return WORKLOADS


def _devices() -> Iterable[str]:
    from evenhand_engine.simulator.device import DEVICES

    return DEVICES


def _policies() -> Iterable[str]:
    from evenhand_engine.simulator.scenario import POLICY_NAMES

    return POLICY_NAMES


def _is_policy(name: str) -> bool:
    from evenhand_engine.simulator.scenario import is_policy

    return is_policy(name)


def _a_number(ctx: click.Context, param: click.Parameter, value: float | None) -> float | None:
    if value is not None and math.isnan(value):  # a range lets it through
        raise click.BadParameter("'nan' is not a time.", ctx, param)
    return value


@click.command()
@click.option("--trace", type=click.Path(path_type=Path), multiple=True, help="CSV of requests; may be repeated.")
@click.option("--workload", type=Name(_workloads), help="A synthetic workload instead of a trace.")
@click.option("--preset", type=Name(_devices), default="a10g-llama-2-7b", help="Device and model.")
@click.option("--steps", type=click.Path(path_type=Path), help="CSV of recorded steps to fit the step time to.")
@click.option("--policies", type=click.Path(path_type=Path), help="Directory of TenantPolicy files.")
@click.option(
    "--scheduling-policy",
    type=Name(_policies, _is_policy),
    multiple=True,
    default=("fair",),
    help="May be repeated, to compare.",
)
@click.option("--sidecar", is_flag=True, help="Add the policy `sidecar`: the sidecar's dispatcher before `fcfs`.")
@click.option(
    "--sidecar-fault",
    type=click.Choice(["late-gauges", "frozen-gauges", "slow-hop", "restart", "wrong-sizes", "silent"]),
    multiple=True,
    help="What goes wrong around it; may be repeated.",
)
@click.option(
    "--long-prefill-tokens",
    type=click.IntRange(1),
    help="Most tokens of one prompt in a step of the engine behind the sidecar; default: all of it.",
)
@click.option("--kv-tokens", type=click.IntRange(16), help="Size of the KV cache; default: the preset's.")
@click.option("--max-model-len", type=click.IntRange(1), help="Most tokens of one request.")
@click.option("--max-num-seqs", type=click.IntRange(1), help="Most requests running at once; default: the preset's.")
@click.option("--max-num-batched-tokens", type=click.IntRange(1), help="Most tokens in a step; default: the preset's.")
@click.option(
    "--target-step-ms",
    type=click.FloatRange(0),
    default=0,
    help="As `serve` has it: 200 on a CPU; 0, the default: none.",
)
@click.option("--enable-prefix-caching/--no-enable-prefix-caching", default=True)
@click.option("--seed", type=click.IntRange(0), default=0, help="Of a synthetic workload.")
@click.option(
    "--until",
    type=click.FloatRange(0, min_open=True),
    callback=_a_number,
    help="Stop at this second; default: when all ended.",
)
@click.option("--plot", type=click.Path(path_type=Path), help="Write a picture of the service over time (PNG, SVG).")
@click.option("-o", "--output", type=click.Choice(["table", "json"]), default="table")
def simulate(**options: Any) -> None:
    """Show what tenants would get: a trace or workload through the scheduler that serves, in virtual time.

    A trace has the columns arrival_s, prompt_tokens, output_tokens and, if it likes, tenant and user. The policies vtc,
    vtc-oracle, lcf, drr, published-fcfs and rpm:N are published baselines, which are told the output lengths.

    \b
    evenhand simulate --workload overload --scheduling-policy fair --scheduling-policy fcfs
    evenhand simulate --trace requests.csv --preset h100-8b --policies policies/ -o json
    """
    if bool(options["trace"]) == bool(options["workload"]):
        raise click.UsageError("Name what to simulate: either --trace FILE or --workload NAME.")
    from evenhand_engine.errors import EvenhandError
    from evenhand_engine.simulator.report import plot_service, report_of
    from evenhand_policy.files import PolicyFileError

    try:
        scenario = _scenario(options)
        policies = (*options["scheduling_policy"], *(["sidecar"] if options["sidecar"] else []))
        runs = {name: scenario.run(name, options["until"] or float("inf")) for name in dict.fromkeys(policies)}
        if options["plot"] is not None:
            plot_service(options["plot"], runs)
    except (EvenhandError, PolicyFileError) as error:
        click.echo(f"evenhand: {error}", err=True)
        sys.exit(1)
    _show([report_of(name, run, scenario.config) for name, run in runs.items()], options["output"])


def _faults(names: Iterable[str], long_prefill_tokens: int | None) -> "SidecarFaults":
    from evenhand_engine.simulator.sidecar import SidecarFaults

    changes: dict[str, dict[str, Any]] = {
        "late-gauges": {"gauge_delay": 6.0},
        "frozen-gauges": {"gauges_freeze_at": 10.0},
        "slow-hop": {"hop_seconds": 0.012},
        "restart": {"restart_at": 30.0},
        "wrong-sizes": {"kv_scale": 0.1, "prompt_scale": 0.5},
        "silent": {"is_silent": True},
    }
    chosen = {key: value for name in names for key, value in changes[name].items()}
    return SidecarFaults(long_prefill_tokens=long_prefill_tokens, **chosen)


def _scenario(options: dict[str, Any]) -> "Scenario":
    from evenhand_engine.core.step_recorder import load_steps
    from evenhand_engine.simulator.device import DEVICES, fit_step_time
    from evenhand_engine.simulator.scenario import Scenario
    from evenhand_engine.simulator.traces import load_trace
    from evenhand_engine.simulator.workloads import WORKLOADS
    from evenhand_policy.files import load_policy_directory

    device = DEVICES[options["preset"]]
    device = replace(device, num_kv_tokens=options["kv_tokens"] or device.num_kv_tokens)
    if options["steps"] is not None:
        device = replace(device, small_step=fit_step_time(*load_steps(options["steps"])), large_step=None)
    if options["workload"] is not None:
        scenario = Scenario.of_workload(WORKLOADS[options["workload"]], device, options["seed"])
    else:
        trace = [request for path in options["trace"] for request in load_trace(path)]
        scenario = Scenario.of_trace(trace, device)
    if options["policies"] is not None:
        scenario = replace(scenario, config=load_policy_directory(options["policies"]))
    scenario = replace(scenario, faults=_faults(options["sidecar_fault"], options["long_prefill_tokens"]))
    given = ("max_model_len", "max_num_seqs", "max_num_batched_tokens", "enable_prefix_caching")
    scenario = scenario.with_settings(**{name: options[name] for name in given if options[name] is not None})
    return scenario.with_settings(target_step_seconds=options["target_step_ms"] / 1e3 or None)


def _show(reports: "list[RunReport]", output: str) -> None:
    if output == "json":
        import msgspec

        click.echo(msgspec.json.format(msgspec.json.encode(reports)).decode())
        return
    from rich.console import Console

    from evenhand_engine.simulator.report import summary_table, tenant_table

    console = Console()
    for report in reports:
        console.print(tenant_table(report))
    console.print(summary_table(reports))
