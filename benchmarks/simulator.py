"""How fast the simulator is: 100,000 requests of Arena lengths over 1,000 tenants, on one core (H100 / 8B preset).

Tenants are of very unequal size (Zipf), and together they ask for more than the machine can do.
"""

import time
from dataclasses import replace

import numpy as np
from common import DATA, arguments, console, finish, machine, print_table

from evenhand_engine.simulator.device import DEVICES
from evenhand_engine.simulator.report import report_of
from evenhand_engine.simulator.scenario import Scenario
from evenhand_engine.simulator.traces import TraceRequest, load_trace

NUM_TENANTS = 1_000
REQUESTS_PER_SECOND = 20.0
DEVICE = replace(DEVICES["h100-8b"], num_kv_tokens=200_000)


def many_tenants(num_requests: int, seed: int) -> list[TraceRequest]:
    """Lengths drawn from the Arena trace, tenants by Zipf's law, Poisson arrivals."""
    lengths = load_trace(DATA / "arena_trace.csv")
    rng = np.random.default_rng(seed)
    popularity = 1.0 / np.arange(1, NUM_TENANTS + 1)
    tenants = rng.choice(NUM_TENANTS, num_requests, p=popularity / popularity.sum())
    arrivals = np.cumsum(rng.exponential(1 / REQUESTS_PER_SECOND, num_requests))
    like = rng.integers(len(lengths), size=num_requests)
    return [
        TraceRequest(f"t{tenant:03}", float(arrival), lengths[i].num_prompt_tokens, lengths[i].num_output_tokens)
        for tenant, arrival, i in zip(tenants, arrivals, like, strict=True)
    ]


def main() -> None:
    options = arguments(__doc__).parse_args()
    console.print(machine())
    num_requests = 2_000 if options.quick else 100_000
    scenario = Scenario.of_trace(many_tenants(num_requests, options.seed), DEVICE)
    began, wall = time.process_time(), time.perf_counter()
    run = scenario.run("fair")
    simulated = time.process_time() - began
    report = report_of("fair", run, scenario.config)
    seconds, wall_seconds = time.process_time() - began, time.perf_counter() - wall
    results = {
        "num_requests": num_requests,
        "num_tenants": len(report.tenants),
        "num_steps": report.num_steps,
        "virtual_s": report.seconds,
        "simulation_cpu_s": simulated,
        "cpu_s": seconds,
        "wall_s": wall_seconds,
        "jain_index": report.jain_index,
    }
    rows = [(name, f"{value:,.3g}" if isinstance(value, float) else f"{value:,}") for name, value in results.items()]
    print_table("Simulation of many tenants, report included", ("figure", "value"), rows)
    finish("simulator", results)


if __name__ == "__main__":
    main()
