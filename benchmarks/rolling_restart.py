"""What a rolling restart costs: pods come and go one by one, and none of the new ones has the document stored.

A real API server holds the policies, the operator runs with the rights of the manifests, and the pods run the engine's
own admin code. Each pod is replaced by one that knows nothing, one after the other; whenever the number of pods changes, so
do every engine's limits, of which each is told.
"""

import asyncio
import time

import common
from pool_stage import PoolStage, pool_stage
from rich.progress import track

NUM_PROCESSES = 2
_COUNTERS = {
    "documents": "evenhand_operator_documents_sent_total",
    "bytes": "evenhand_operator_pushed_bytes_total",
    "pushes": "evenhand_operator_push_seconds_count",
}


async def measure(stage: PoolStage, num_pods: int, num_policies: int, pause: float) -> dict[str, float]:
    """What was sent from the first replacement until every new pod enforces what it should. `pause`: seconds between two
    replacements."""
    await stage.create_policies(range(num_policies))
    stage.operator.start()
    await stage.crowd.enforced_at(f"team-{num_policies - 1}", 1)
    await stage.until_right()
    await _until_quiet(stage)
    before = _count(stage)
    started_at = time.monotonic()
    for _ in track(range(num_pods), "replacing", console=common.console, transient=True):
        await stage.crowd.replace_first(stage.client)
        await asyncio.sleep(pause)
    await stage.crowd.enforced_at(f"team-{num_policies - 1}", 1)
    await _until_quiet(stage)
    after = _count(stage)
    return {name: after[name] - before[name] for name in after} | {"seconds": time.monotonic() - started_at}


def _count(stage: PoolStage) -> dict[str, float]:
    counted = {name: stage.operator.metric(metric) for name, metric in _COUNTERS.items()}
    writes = "evenhand_operator_api_writes_total"
    return counted | {
        "pool_writes": stage.operator.metric(writes, resource="enginepools/status"),
        "policy_writes": stage.operator.metric(writes, resource="tenantpolicies/status"),
    }


async def _until_quiet(stage: PoolStage) -> None:
    """Returns when no pod waits for anything, and nothing was pushed for a while."""
    before = -1.0
    while before != (now := stage.operator.metric(_COUNTERS["pushes"])) or stage.operator.metric(
        "evenhand_operator_queue_depth", queue="pods"
    ):
        before = now
        await asyncio.sleep(2)


async def run(num_pods: int, num_policies: int, pause: float) -> None:
    async with pool_stage(num_pods, NUM_PROCESSES, num_spares=num_pods) as stage:
        first = await measure(stage, num_pods, num_policies, pause)
        size = first["bytes"] / first["documents"]
    rows = [
        ["one document, as it is sent", f"{size / 1000:.1f} KB"],
        ["documents' bytes per pod, in documents: at most 1.2", f"{first['bytes'] / size / num_pods:.2f}"],
        ["requests that brought a pod up to date, per pod", f"{first['pushes'] / num_pods:.1f}"],
        [
            "writes of the pool's status, of policies' statuses",
            f"{first['pool_writes']:.0f}, {first['policy_writes']:.0f}",
        ],
        ["all of it took", f"{first['seconds']:.0f} s"],
    ]
    common.print_table(f"a rolling restart of {num_pods} pods, {num_policies} policies", ["", ""], rows)
    results = {
        "pods": num_pods,
        "policies": num_policies,
        "document_bytes": size,
        "documents_per_pod": first["bytes"] / size / num_pods,
        "pushes_per_pod": first["pushes"] / num_pods,
        "pool_status_writes": first["pool_writes"],
        "policy_status_writes": first["policy_writes"],
        "seconds": first["seconds"],
    }
    common.finish("rolling_restart", results)


def main() -> None:
    parser = common.arguments(__doc__)
    parser.add_argument("--pause", type=float, default=0.5, help="seconds between two replacements")
    options = parser.parse_args()
    num_pods, num_policies = (5, 50) if options.quick else (100, 1000)
    asyncio.run(run(num_pods, num_policies, options.pause))


if __name__ == "__main__":
    main()
