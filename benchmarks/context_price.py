"""Two tenants of equal weight, short contexts and long ones, on the CPU preset: who gets how much of the machine's time?

Both flood the engine with prompts of 100 new tokens and 200 outputs; those of one stand behind a prefix of 3,000 tokens
that is cached. With `prices.contextToken` 0 both get the same tokens; with the price that a fit of the run's own step
times suggests, the same time. `long_share`: the part of the device's time that the tenant with long contexts took while
both were backlogged, by the fit; a step's constant part is split by tokens.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import msgspec
from common import arguments, console, finish, machine, print_table

from evenhand_engine.scheduler.batch import Batch
from evenhand_engine.scheduler.request import Request, RequestOutput, Sampled
from evenhand_engine.scheduler.scheduler import Scheduler
from evenhand_engine.scheduler.step_time import shape_of
from evenhand_engine.simulator.device import DEVICES, LinearStepTime, fit_step_time
from evenhand_engine.simulator.scenario import Scenario
from evenhand_engine.simulator.simulation import Run, Simulation
from evenhand_engine.simulator.traces import TraceRequest
from evenhand_policy.config import Prices

DEVICE = DEVICES["cpu-135m"]
SHORT, LONG = "short", "long"
NUM_PREFIX_TOKENS, NUM_OWN_TOKENS, NUM_OUTPUT_TOKENS = 3_000, 100, 200
WARM_UP_SECONDS = 30.0


@dataclass
class Meter:
    """A scheduler that notes whose each part of a step is, and how long it takes by the device's step time."""

    scheduler: Scheduler
    seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))

    def add(self, request: Request, now: float) -> None:
        self.scheduler.add(request, now)

    def update(self, sampled: Sequence[Sampled], now: float) -> list[RequestOutput]:
        return self.scheduler.update(sampled, now)

    def collect(self) -> list[RequestOutput]:
        return self.scheduler.collect()

    def step(self, now: float) -> Batch | None:
        batch = self.scheduler.step(now)
        if batch is not None and now >= WARM_UP_SECONDS:
            self._note(batch)
        return batch

    def _note(self, batch: Batch) -> None:
        tenants = self.scheduler.request_table.running_tenants.values()
        owners = {request.seat: tenant.tenant_id for tenant in tenants for request in tenant.running()}
        own = replace(DEVICE.small_step, intercept=0.0)
        for index, item in enumerate(batch.scheduled):
            alone = Batch(batch.step_id, (item,), int(index < batch.num_decodes))
            constant = DEVICE.small_step.intercept * item.num_scheduled_tokens / batch.num_tokens
            self.seconds[owners[item.seat]] += own.seconds(shape_of(alone)) + constant


def requests(num_requests: int) -> list[TraceRequest]:
    """All at once: both tenants are backlogged until the end."""
    long = TraceRequest(
        LONG,
        0.0,
        NUM_PREFIX_TOKENS + NUM_OWN_TOKENS,
        NUM_OUTPUT_TOKENS,
        prefix="instructions",
        num_prefix_tokens=NUM_PREFIX_TOKENS,
    )
    short = TraceRequest(SHORT, 0.0, NUM_OWN_TOKENS, NUM_OUTPUT_TOKENS)
    return [long, short] * num_requests


def run_at(price: int, trace: list[TraceRequest], until: float) -> tuple[Run, Meter]:
    scenario = Scenario.of_trace(trace, DEVICE)
    config = msgspec.structs.replace(scenario.config, prices=Prices(context_token=price))
    meter = Meter(Scheduler(scenario.settings, config))
    simulation = Simulation(meter, DEVICE, trace, max_model_len=scenario.settings.max_model_len)
    return simulation.run(until), meter


def suggested_price(fit: LinearStepTime, run: Run, meter: Meter) -> int:
    """Units for 1,000 tokens attended to: their seconds by the fit, over those that one unit took otherwise."""
    context_seconds = num_attended = 0.0
    for shape in run.steps.shapes:
        context_seconds += fit.per_decode_context * shape.decode_context + fit.per_prefill_pair * shape.prefill_pairs
        context_seconds += fit.per_prefill_context * shape.prefill_context
        num_attended += shape.decode_context + shape.prefill_pairs
    units = sum(tenant.service for tenant in meter.scheduler.request_table.tenants.values())
    seconds_per_unit = (sum(run.steps.seconds) - context_seconds) / units
    return round(1_000 * context_seconds / num_attended / seconds_per_unit)


def main() -> None:
    options = arguments(__doc__).parse_args()
    console.print(machine())
    until = 150.0 if options.quick else 600.0
    trace = requests(400 if options.quick else 1_500)
    free, meter = run_at(0, trace, until)
    price = suggested_price(fit_step_time(free.steps.shapes, free.steps.seconds), free, meter)
    results = {}
    for name, at in (("0", 0), ("suggested", price)):
        _, meter = run_at(at, trace, until)
        service = {
            tenant.tenant_id: tenant.num_generation_tokens for tenant in meter.scheduler.request_table.tenants.values()
        }
        results[name] = {
            "price": at,
            "long_share": meter.seconds[LONG] / sum(meter.seconds.values()),
            "long_share_of_outputs": service[LONG] / sum(service.values()),
        }
    rows = [
        (f"{found['price']:.0f}", f"{found['long_share']:.3f}", f"{found['long_share_of_outputs']:.3f}")
        for found in results.values()
    ]
    print_table(
        "Two tenants of equal weight, contexts of 200 and of 3,200 tokens", ("contextToken", "time", "outputs"), rows
    )
    finish("context_price", results)


if __name__ == "__main__":
    main()
