"""A tenant under its share beside one that fills the KV cache with long outputs (H100 / 8B preset, 32,768 KV tokens).

The light tenant sends one request a second (200 tokens in, 200 out); the heavy one keeps a backlog of long outputs
(B: 64 in, 3,000 out) or of long everything (A: 3,000 in, 1,500 out); lengths vary by half. Plain VTC makes the light one
wait until somebody finishes. Ours guarantees it a part of the KV cache, which is lent while it is not used.

`under_share_ttft_p99_s`: of the light tenant; `tokens_per_s`: input and output tokens computed for both.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
from common import arguments, console, finish, machine, print_table

from evenhand_engine.simulator.device import DEVICES
from evenhand_engine.simulator.measures import RequestRecord
from evenhand_engine.simulator.report import percentile
from evenhand_engine.simulator.scenario import Scenario
from evenhand_engine.simulator.simulation import Run
from evenhand_engine.simulator.traces import TraceRequest
from evenhand_policy.config import KvCacheShare, SchedulerConfig, TenantConfig

DEVICE = replace(DEVICES["h100-8b"], num_kv_tokens=32_768)
HEAVY = {"A": (3_000, 1_500), "B": (64, 3_000)}
GUARANTEED_PERCENT = 15
CONTEXT = 8_192


def requests(heavy: str, seconds: float, seed: int) -> Iterator[TraceRequest]:
    rng = np.random.default_rng(seed)

    def around(mean: int) -> int:
        return int(rng.integers(mean // 2, mean * 3 // 2 + 1))

    time = rng.exponential()
    while time < seconds:
        yield TraceRequest("light", time, around(200), around(200))
        time += rng.exponential()
    prompt, output = HEAVY[heavy]
    for _ in range(int(seconds)):
        yield TraceRequest("heavy", 0.0, around(prompt), around(output))


def scenario(heavy: str, seconds: float, seed: int, *, guarantee: bool) -> Scenario:
    share = KvCacheShare(guaranteed_percent=GUARANTEED_PERCENT if guarantee else 0)
    tenants = (TenantConfig(tenant_id="heavy"), TenantConfig(tenant_id="light", kv_cache=share))
    made = Scenario.of_trace(list(requests(heavy, seconds, seed)), DEVICE, SchedulerConfig(tenants=tenants))
    return made.with_settings(max_model_len=CONTEXT, max_num_batched_tokens=512, enable_prefix_caching=False)


def tokens(record: RequestRecord) -> int:
    """Computed for the request: its prompt once it is done, and every output."""
    return 0 if record.token_times is None else record.num_prompt_tokens + len(record.token_times)


def figures(runs: list[Run]) -> dict[str, Any]:
    """Of all runs together; a light request that never got a token counts as having waited until the end."""
    waits = [
        (run.end_time if record.first_token_time is None else record.first_token_time) - record.arrival_time
        for run in runs
        for record in run.records
        if record.tenant_id == "light"
    ]
    return {
        "under_share_ttft_p50_s": percentile(waits, 50),
        "under_share_ttft_p99_s": percentile(waits, 99),
        "tokens_per_s": sum(tokens(record) for run in runs for record in run.records) / sum(r.end_time for r in runs),
        "preemptions": sum(record.num_preemptions for run in runs for record in run.records),
    }


def main() -> None:
    options = arguments(__doc__).parse_args()
    console.print(machine())
    seconds, num_seeds = (60.0, 1) if options.quick else (400.0, 3)
    policies = {
        "vtc": ("vtc", False),
        "fcfs": ("fcfs", False),
        "fair": ("fair", False),
        "fair + guarantee": ("fair", True),
    }
    results: dict[str, dict[str, Any]] = {}
    for heavy, lengths in HEAVY.items():
        found = {
            name: figures(
                [
                    scenario(heavy, seconds, options.seed + i, guarantee=guarantee).run(policy, until=seconds)
                    for i in range(num_seeds)
                ]
            )
            for name, (policy, guarantee) in policies.items()
        }
        results[heavy] = found
        reference = found["vtc"]["tokens_per_s"]
        rows = [
            (
                name,
                f"{f['under_share_ttft_p50_s']:.2f}",
                f"{f['under_share_ttft_p99_s']:.2f}",
                f"{f['tokens_per_s']:,.0f}",
                f"{f['tokens_per_s'] / reference - 1:+.1%}",
                f"{f['preemptions']:,}",
            )
            for name, f in found.items()
        ]
        headings = ("policy", "light TTFT p50 s", "p99 s", "tok/s", "against vtc", "preemptions")
        print_table(f"Light tenant beside heavy {heavy} ({lengths[0]:,} in, {lengths[1]:,} out)", headings, rows)
    finish("kv_hog", {"policies": results["B"], "heavy_a": results["A"]})


if __name__ == "__main__":
    main()
