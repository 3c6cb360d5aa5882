"""What a push costs the operator: its processor time for each change of a policy, by the number of pods.

It should be linear: for each pod a request is signed, sent, answered, and the answer verified. The pods run the engine's
own admin code, many to a process; what they cost is not counted.
"""

import asyncio
import statistics
from collections.abc import Sequence

import common
from pool_stage import pool_stage, processor_seconds

NUM_PROCESSES = 2
NUM_POLICIES = 100


async def measure(num_pods: int, num_changes: int) -> float:
    """Median of the seconds of processor time that the operator takes from one change to the next."""
    async with pool_stage(num_pods, NUM_PROCESSES) as stage:
        await stage.create_policies(range(NUM_POLICIES))
        stage.operator.start()
        await stage.crowd.enforced_at(f"team-{NUM_POLICIES - 1}", 1, 60)
        await stage.until_right()
        operator, took = [stage.operator.program.pid], []
        for index in range(num_changes):
            before = processor_seconds(operator)
            stored = await stage.set_weight(f"team-{index}", 2 + index)
            await stage.crowd.enforced_at(f"team-{index}", stored["metadata"]["generation"], 60)
            await stage.until_right()
            took.append(processor_seconds(operator) - before)
    return statistics.median(took)


async def run(sizes: Sequence[int], num_changes: int) -> None:
    found = {size: await measure(size, num_changes) for size in sizes}
    rows = [[f"{size} pods", f"{seconds:.2f} s", f"{1000 * seconds / size:.2f} ms"] for size, seconds in found.items()]
    common.print_table("the operator's processor time for one change", ["", "in all", "per pod"], rows)
    results = {f"ms_per_pod_{size}": 1000 * seconds / size for size, seconds in found.items()}
    common.finish("push_cost", results)


def main() -> None:
    parser = common.arguments(__doc__)
    parser.add_argument("--pods", type=int, nargs="+", default=[250, 500, 1000])
    options = parser.parse_args()
    asyncio.run(run(*(([5, 10], 3) if options.quick else (options.pods, 7))))


if __name__ == "__main__":
    main()
