"""The operator with thousands of policies on a real API server: a cold start, a commit of changes, its memory.

First 3,000 policies: how long after its start the operator pushes; then 200 of them are changed as a pipeline would. Then
10,000 policies, of which some are changed, deleted and created: what the engines enforce is compared with what is
stored, one by one. It is called operator_scale since a file operator.py would hide the standard library's.
"""

import asyncio
import random
import time
from typing import NamedTuple

import common
import psutil
from pool_stage import PoolStage, pool_stage

NUM_PODS = 3
LOST_SECONDS = 180.0  # a change that is not enforced by then counts as missed


class Shape(NamedTuple):
    """How many policies: at the cold start, changed in one commit, at the largest, and changed then."""

    cold: int
    batch: int
    most: int
    churn: int


class Batch(NamedTuple):
    """What a commit of changes took: seconds from its last write until every engine and every status is right; builds,
    writes of policies' statuses, and all writes to the API server."""

    enforced_s: float
    status_s: float
    builds: float
    status_writes: float
    api_writes: float


async def measure_cold_start(stage: PoolStage, num_policies: int) -> float:
    """Seconds from the operator's start until every pod enforces all policies."""
    await stage.create_policies(range(num_policies))
    started_at = time.monotonic()
    stage.operator.start(wait=False)
    pushed_at = max(await stage.crowd.enforced_at(f"team-{num_policies - 1}", 1))
    await stage.until_right()
    return pushed_at - started_at


async def measure_batch(stage: PoolStage, num_policies: int, num_changes: int, choose: random.Random) -> Batch:
    """Change many policies at once and wait until that is everywhere."""
    common.console.print(f"changing {num_changes} of them")
    names = [f"team-{index}" for index in choose.sample(range(num_policies), num_changes)]
    before = _counters(stage)
    async with stage.watching_until_right(names, 2) as right:
        generations = await stage.set_weights(dict.fromkeys(names, 2))
        written_at = time.monotonic()
        times = [max(await stage.crowd.enforced_at(name, generations[name])) for name in names]
        right_at = await right
    counted = [after - earlier for after, earlier in zip(_counters(stage), before, strict=True)]
    return Batch(max(times) - written_at, right_at - written_at, *counted)


async def follow_changes(stage: PoolStage, shape: Shape, choose: random.Random) -> tuple[int, float]:
    """Start with the most policies, then change, delete and create some at once, while the operator still writes the
    statuses of the others; returns how many of these changes no engine came to enforce, and the seconds from the
    last write until all the others were enforced."""
    common.console.print(f"starting with {shape.most} policies")
    stage.operator.stop()
    await stage.create_policies(range(shape.cold, shape.most))
    stage.operator.start(wait=False)
    await stage.crowd.enforced_at(f"team-{shape.most - 1}", 1)
    chosen = [f"team-{index}" for index in choose.sample(range(shape.most), 2 * shape.churn)]
    changed, deleted = chosen[: shape.churn], chosen[shape.churn :]
    created = range(shape.most, shape.most + shape.churn)
    generations, _, _ = await asyncio.gather(
        stage.set_weights(dict.fromkeys(changed, 7)), stage.delete_policies(deleted), stage.create_policies(created)
    )
    written_at = time.monotonic()
    common.console.print("looking for what was missed")
    expected: dict[str, int | None] = {**generations, **dict.fromkeys(deleted), **{f"team-{i}": 1 for i in created}}
    num_missed, last_at = 0, written_at
    for name, generation in expected.items():
        try:
            last_at = max(last_at, *await stage.crowd.enforced_at(name, generation, LOST_SECONDS))
        except TimeoutError:
            common.console.print(f"no engine came to enforce {name} at generation {generation}")
            num_missed += 1
    return num_missed, last_at - written_at


def _counters(stage: PoolStage) -> tuple[float, float, float]:
    """Builds, writes of policies' statuses, all writes."""
    writes = "evenhand_operator_api_writes_total"
    return (
        stage.operator.metric("evenhand_operator_builds_total"),
        stage.operator.metric(writes, resource="tenantpolicies/status"),
        stage.operator.metric(writes),
    )


def most_resident_mib(pid: int) -> float:
    """The largest resident memory that the process ever had (Linux), else what it has now."""
    try:
        with open(f"/proc/{pid}/status", encoding="ascii") as status:
            return next(int(line.split()[1]) / 1024 for line in status if line.startswith("VmHWM"))
    except OSError:
        return float(psutil.Process(pid).memory_info().rss / 2**20)


async def run(shape: Shape, seed: int) -> None:
    choose = random.Random(seed)
    async with pool_stage(NUM_PODS, 1) as stage:
        common.console.print(f"creating {shape.cold} policies, then starting the operator")
        cold = await measure_cold_start(stage, shape.cold)
        common.console.print(f"first push after {cold:.2f} s")
        batch = await measure_batch(stage, shape.cold, shape.batch, choose)
        common.console.print(batch)
        missed, slowest = await follow_changes(stage, shape, choose)
        resident = most_resident_mib(stage.operator.program.pid)
    rows = [
        [f"start to first push, {shape.cold} policies", f"{cold:.2f} s"],
        [f"{shape.batch} policies changed: last write to enforced", f"{batch.enforced_s:.2f} s"],
        ["last write to every status right", f"{batch.status_s:.2f} s"],
        ["builds", f"{batch.builds:.0f}"],
        ["writes of policies' statuses", f"{batch.status_writes:.0f}"],
        ["all writes to the API server", f"{batch.api_writes:.0f}"],
        [f"most resident memory, {shape.most} policies", f"{resident:.0f} MiB"],
        [f"missed of {3 * shape.churn} changes while all statuses are first written", f"{missed}"],
        ["last write to all of these enforced", f"{slowest:.2f} s"],
    ]
    common.print_table("the operator", ["", ""], rows)
    results = {
        "cold_first_push_s": cold,
        "batch_change_s": batch.status_s,
        "batch_builds": batch.builds,
        "batch_status_writes": batch.status_writes,
        "resident_mib": resident,
        "missed_changes": missed,
        "slowest_change_s": slowest,
        "api_writes": batch.api_writes,
    }
    common.finish("operator", results)


def main() -> None:
    options = common.arguments(__doc__).parse_args()
    shape = Shape(100, 20, 200, 10) if options.quick else Shape(3000, 200, 10_000, 300)
    asyncio.run(run(shape, options.seed))


if __name__ == "__main__":
    main()
