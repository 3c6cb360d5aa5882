"""What the scheduler itself costs: seconds of `step` and `update` together, without a model.

256 running requests, most of them decoding, in a closed loop: whoever finishes is replaced. The table shows that the
cost grows with running requests, not with tenants that are idle; the last row has a queue in front of every tenant.
"""

import random
import statistics
import time

import common

from evenhand_engine.config import SchedulerSettings
from evenhand_engine.scheduler.request import Request, Sampled, SamplingParams
from evenhand_engine.scheduler.scheduler import Scheduler
from evenhand_policy.config import SchedulerConfig, TenantConfig

_TEXT = Sampled((5,))


class ClosedLoop:
    """Keeps `num_requests` in a scheduler, over the first `num_busy` of `num_tenants` tenants."""

    def __init__(self, num_running: int, num_busy: int, num_tenants: int, num_requests: int, seed: int) -> None:
        tenants = tuple(TenantConfig(tenant_id=f"t{index}", weight=1 + index % 9) for index in range(num_tenants))
        settings = SchedulerSettings(max_num_seqs=num_running, num_kv_blocks=40_000)
        self.scheduler = Scheduler(settings, SchedulerConfig(tenants=tenants))
        self._random = random.Random(seed)
        self._now = 0.0
        self._num_busy = num_busy
        self._num_added = 0
        for tenant in tenants:
            self.scheduler.request_table.tenant(tenant.tenant_id)  # as if each had been busy once
        for _ in range(num_requests):
            self._add()
        while self.scheduler.request_table.num_running < num_running:
            self.step()

    def step(self) -> float:
        """One step and its update; returns their seconds."""
        self._now += 0.05
        started_at = time.perf_counter()
        batch = self.scheduler.step(self._now)
        seconds = time.perf_counter() - started_at
        assert batch is not None
        sampled = [_TEXT for item in batch.scheduled if item.num_samples]
        started_at = time.perf_counter()
        outputs = self.scheduler.update(sampled, self._now + 0.04)
        seconds += time.perf_counter() - started_at
        for _ in range(sum(output.finish_reason is not None for output in outputs)):
            self._add()
        return seconds

    def _add(self) -> None:
        number = self._num_added
        self._num_added += 1
        request = Request(
            f"r{number}",
            f"t{number % self._num_busy}",
            [number, *range(99)],
            SamplingParams(max_tokens=self._random.randint(50, 400)),
            self._now,
        )
        self.scheduler.add(request, self._now)


def main() -> None:
    options = common.arguments(__doc__).parse_args()
    num_steps = 50 if options.quick else 1000
    shapes = {  # name: running, busy tenants, tenants, requests
        "64 running, 64 tenants": (64, 64, 64, 64),
        "256 running, 8 tenants": (256, 8, 8, 256),
        "256 running, 256 tenants": (256, 256, 256, 256),
        "256 running, 1,000 tenants": (256, 256, 1000, 256),
        "256 running, 10,000 tenants": (256, 256, 10_000, 256),
        "256 running, 1,000 tenants, each with a queue": (256, 1000, 1000, 2000),
    }
    medians, rows = {}, []
    for name, shape in shapes.items():
        loop = ClosedLoop(*shape, options.seed)
        seconds = sorted(loop.step() for _ in range(num_steps))
        medians[name] = 1000 * statistics.median(seconds)
        rows.append([name, f"{medians[name]:.2f}", f"{1000 * seconds[int(0.99 * num_steps)]:.2f}"])
    common.print_table("step + update", ["shape", "p50 ms", "p99 ms"], rows)
    results = {"step_update_p50_ms": medians["256 running, 1,000 tenants"], "by_shape_p50_ms": medians}
    common.finish("scheduler", results)


if __name__ == "__main__":
    main()
