"""One prompt of 28,000 tokens beside 20 streams, on the H100 / 8B preset: does anybody's stream freeze?

`max_gap_ratio`: the longest gap between two tokens of a stream over the inter-token objective of 100 ms; at most 2.
`prefill_ratio`: time to the long prompt's first token beside the streams over that alone at 512 tokens a step.
"""

from dataclasses import replace

from common import arguments, console, finish, machine, print_table

from evenhand_engine.simulator.device import DEVICES
from evenhand_engine.simulator.report import gaps_of
from evenhand_engine.simulator.scenario import Scenario
from evenhand_engine.simulator.simulation import Run
from evenhand_engine.simulator.workloads import WORKLOADS

OBJECTIVE_SECONDS = 0.1
DEVICE = replace(DEVICES["h100-8b"], num_kv_tokens=131_072)
LONG = "reasoning"


def prefill_seconds(run: Run) -> float:
    """From the long prompt's arrival to its first token."""
    (record,) = (record for record in run.records if record.tenant_id == LONG)
    assert record.first_token_time is not None
    return record.first_token_time - record.arrival_time


def longest_gap(run: Run) -> float:
    """Of all streams, in seconds, from the arrival of the long prompt on."""
    return float(gaps_of([record for record in run.records if record.tenant_id != LONG]).max())


def main() -> None:
    options = arguments(__doc__).parse_args()
    console.print(machine())
    beside = Scenario.of_workload(WORKLOADS["reasoning_prompt"], DEVICE, options.seed)
    alone = replace(beside, trace=[request for request in beside.trace if request.tenant_id == LONG])
    reference = prefill_seconds(alone.with_settings(max_num_batched_tokens=512).run("fair"))
    runs = {
        "fair": beside.run("fair"),
        "fcfs, whole prompt": beside.with_settings(max_num_batched_tokens=32_768).run("fcfs"),
        "fcfs, C=2048": beside.run("fcfs"),
        "fcfs, C=512": beside.with_settings(max_num_batched_tokens=512).run("fcfs"),
    }
    results = {
        name: {
            "max_gap_s": longest_gap(run),
            "max_gap_ratio": longest_gap(run) / OBJECTIVE_SECONDS,
            "prefill_s": prefill_seconds(run),
            "prefill_ratio": prefill_seconds(run) / reference,
        }
        for name, run in runs.items()
    }
    rows = [
        (
            name,
            f"{found['max_gap_s'] * 1_000:,.0f}",
            f"{found['max_gap_ratio']:.2f}",
            f"{found['prefill_s']:.2f}",
            f"{found['prefill_ratio']:.2f}",
        )
        for name, found in results.items()
    ]
    headings = ("policy", "longest gap ms", "over objective", "prefill s", "over alone at C=512")
    print_table(f"28,000-token prompt beside 20 streams; alone at C=512 it takes {reference:.2f} s", headings, rows)
    finish("long_prompt", {"policies": results, **results["fair"]})


if __name__ == "__main__":
    main()
