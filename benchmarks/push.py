"""From the answer to a policy's change until every engine pod enforces it.

A real API server holds the policies, the operator runs with the rights of the manifests, and the pods run the engine's
own admin code, without a model, in as many processes as this machine has cores. One policy is changed at a time.

Pods have machines of their own elsewhere, so what a change takes of processor time is told apart: the operator's, until
statuses are written too, and one pod's.
"""

import asyncio
import random
import statistics
import time
from typing import NamedTuple

import common
from pool_stage import PoolStage, pool_stage, processor_seconds
from rich.progress import track

NUM_PROCESSES = 2


class Measured(NamedTuple):
    """Seconds until the first pod and until the last one enforces a change, in order of the changes; and of processor time,
    for each change, that the operator takes, and all pods."""

    first: list[float]
    last: list[float]
    operator: float
    pods: float


async def measure(stage: PoolStage, num_policies: int, num_changes: int, seed: int) -> Measured:
    await stage.create_policies(range(num_policies))
    stage.operator.start()
    await stage.crowd.enforced_at(f"team-{num_policies - 1}", 1)
    await stage.until_right()
    first, last = [], []
    choose = random.Random(seed)
    processes = [stage.operator.program.pid], stage.crowd.pids
    before = list(map(processor_seconds, processes))
    for index in track(range(num_changes), "changing", console=common.console, transient=True):
        name = f"team-{choose.randrange(num_policies)}"
        stored = await stage.set_weight(name, 2 + index)
        answered_at = time.monotonic()
        times = await stage.crowd.enforced_at(name, stored["metadata"]["generation"])
        first.append(min(times) - answered_at)
        last.append(max(times) - answered_at)
        await asyncio.sleep(choose.uniform(0.3, 0.6))  # statuses are written, and nothing is in step with a timer
    operator, pods = [
        (processor_seconds(pids) - was) / num_changes for pids, was in zip(processes, before, strict=True)
    ]
    return Measured(first, last, operator, pods)


async def run(shape: tuple[int, int, int], seed: int) -> None:
    num_pods, num_policies, num_changes = shape
    async with pool_stage(num_pods, NUM_PROCESSES) as stage:
        found = await measure(stage, num_policies, num_changes, seed)
    rows = [
        [name, *(f"{quantile(seconds, q):.3f}" for q in (0.5, 0.9, 0.99))]
        for name, seconds in (("first pod", found.first), ("all pods", found.last))
    ]
    title = f"seconds from a change to {num_pods} pods that enforce it, {num_policies} policies, {num_changes} changes"
    common.print_table(title, ["", "p50", "p90", "p99"], rows)
    operator_ms, pod_ms = 1000 * found.operator, 1000 * found.pods / num_pods
    costs = [["the operator", f"{operator_ms:.0f} ms"], ["one pod", f"{pod_ms:.1f} ms"]]
    common.print_table("processor time for one change", ["", ""], costs)
    results = {
        "pods": num_pods,
        "policies": num_policies,
        "changes": num_changes,
        "enforced_p50_s": quantile(found.last, 0.5),
        "enforced_p99_s": quantile(found.last, 0.99),
        "operator_ms": operator_ms,
        "pod_ms": pod_ms,
    }
    common.finish("push", results)


def quantile(values: list[float], q: float) -> float:
    """Of at least two values; p99 of fewer than a hundred is nearly the largest."""
    return statistics.quantiles(values, n=100, method="inclusive")[round(100 * q) - 1]


def main() -> None:
    parser = common.arguments(__doc__)
    parser.add_argument("--pods", type=int, default=50)
    options = parser.parse_args()
    shape = (5, 100, 5) if options.quick else (options.pods, 1000, 60)
    asyncio.run(run(shape, options.seed))


if __name__ == "__main__":
    main()
