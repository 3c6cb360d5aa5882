"""An operator of the whole cluster at its start: how soon the first change is in force, and how much memory it takes.

10,000 policies with a Secret each, beside as many Secrets and Pods of others, of which the operator's selectors keep it.
Once every engine enforces all policies, one of them is changed, again and again while the operator still writes the
statuses of the others, and Kopf still lists.
"""

import asyncio
import statistics
import time

import common
from operator_scale import most_resident_mib
from pool_stage import PoolStage, pool_stage

NUM_PODS = 3
NUM_CHANGES = 5


async def measure_first_changes(stage: PoolStage, num_policies: int) -> tuple[float, list[float]]:
    """Seconds from the operator's start until every engine enforces all policies; seconds that each of the changes
    takes, from before its write, that follow at once."""
    last = f"team-{num_policies - 1}"
    started_at = time.monotonic()
    stage.operator.start(wait=False)
    pushed_at = max(await stage.crowd.enforced_at(last, 1, 120))
    took = []
    for weight in range(2, 2 + NUM_CHANGES):
        changed_at = time.monotonic()
        generation = (await stage.set_weight("team-0", weight))["metadata"]["generation"]
        took.append(max(await stage.crowd.enforced_at("team-0", generation, 60)) - changed_at)
    return pushed_at - started_at, took


async def run(num_policies: int, num_strangers: int) -> None:
    async with pool_stage(NUM_PODS, 1, cluster_wide=True) as stage:
        common.console.print(
            f"creating {num_policies} policies and Secrets, {num_strangers} Pods and Secrets of others"
        )
        await stage.create_policies(range(num_policies))
        await stage.create_strangers(num_strangers)
        cold, took = await measure_first_changes(stage, num_policies)
        common.console.print(
            f"first push after {cold:.2f} s, changes after {', '.join(f'{each:.2f}' for each in took)} s"
        )
        resident = most_resident_mib(stage.operator.program.pid)
    rows = [
        [f"start to first push, {num_policies} policies and Secrets", f"{cold:.2f} s"],
        ["the first change after it: written to enforced", f"{took[0]:.2f} s"],
        [f"the first {NUM_CHANGES}, median and largest", f"{statistics.median(took):.2f} s, {max(took):.2f} s"],
        [f"most resident memory, beside {num_strangers} Pods and Secrets of others", f"{resident:.0f} MiB"],
    ]
    common.print_table("an operator of the whole cluster", ["", ""], rows)
    results = {
        "cold_first_push_s": cold,
        "first_change_s": took[0],
        "largest_of_first_changes_s": max(took),
        "resident_mib": resident,
    }
    common.finish("cluster_wide", results)


def main() -> None:
    options = common.arguments(__doc__).parse_args()
    asyncio.run(run(*((200, 200) if options.quick else (10_000, 10_000))))


if __name__ == "__main__":
    main()
