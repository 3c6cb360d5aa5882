"""The step time of this machine: records a run of the real engine and fits the simulator's linear step time to it.

From 1 to 30 clients in a closed loop, another number every eight seconds, mix short and long prompts with short and long
outputs, so that steps of every kind come: decodes of few and of many streams, chunks of prompts behind contexts, and both
together. Every second step is fitted, the others tell how well it fits: with what the fitted steps around them tell of the
machine's speed at that moment, and without. The preset `cpu-135m` is made by this command.

    --keep FILE    write the recording here
    --steps FILE   fit a recording that exists (`evenhand serve --record-steps FILE`)
"""

import asyncio
import random
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import common
import numpy as np
import serving

from evenhand_engine.core.step_recorder import load_steps
from evenhand_engine.scheduler.step_time import StepShape
from evenhand_engine.simulator.drift import fit_with_drift
from evenhand_engine.simulator.measures import FloatArray

CLIENTS = (1, 2, 4, 8, 16, 30)  # at once, each number for a phase
LONGEST_PROMPTS = (16, 100, 400, 1_500)
OUTPUTS = (16, 64, 128)
PHASE_SECONDS = 8.0
PERCENTILES = (10, 50, 90, 99)


async def load(server: serving.Server, seconds: float, seed: int) -> None:
    """Phases of few and of many clients; one that is too many is cut off."""
    rng = random.Random(seed)

    async def client() -> None:
        async with server.client("none") as openai_client:
            while True:
                num_tokens = rng.randint(8, rng.choice(LONGEST_PROMPTS))
                prompt = [rng.randrange(1_000, 40_000) for _ in range(num_tokens)]
                await serving.stream(openai_client, serving.Timing(time.monotonic()), prompt, rng.choice(OUTPUTS))

    clients: list[asyncio.Task[None]] = []
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        for num_clients in rng.sample(CLIENTS, len(CLIENTS)):
            await serving.cancel(clients[num_clients:])
            clients[num_clients:] = [asyncio.create_task(client()) for _ in range(num_clients - len(clients))]
            await asyncio.sleep(min(PHASE_SECONDS, max(0.0, until - time.monotonic())))
    await serving.cancel(clients)


def record(seconds: float, seed: int, keep: Path | None) -> tuple[list[StepShape], list[float]]:
    """The steps of a run of that long on the default model."""
    with tempfile.TemporaryDirectory() as folder:
        path = keep or Path(folder) / "steps.csv"
        with serving.serve("--record-steps", str(path), "--no-enable-prefix-caching") as server:
            asyncio.run(load(server, seconds, seed))
        return load_steps(path)


def errors(fitted: FloatArray, seconds: FloatArray) -> dict[str, float]:
    """Relative errors of single steps by percentile, and of all steps' time together."""
    single = {f"p{percent}": float(np.percentile(fitted / seconds - 1.0, percent)) for percent in PERCENTILES}
    return {**single, "total": float(fitted.sum() / seconds.sum() - 1.0)}


def kinds(shapes: Sequence[StepShape]) -> dict[str, list[int]]:
    """Positions of the steps that only decode, and of those that compute prompts."""
    return {
        "decodes alone": [i for i, shape in enumerate(shapes) if not shape.num_prefill_tokens],
        "with prompts": [i for i, shape in enumerate(shapes) if shape.num_prefill_tokens],
        "all": list(range(len(shapes))),
    }


def main() -> None:
    parser = common.arguments(__doc__)
    parser.add_argument("--steps", type=Path, help="fit this recording instead of making one")
    parser.add_argument("--keep", type=Path, help="write the recording here")
    options = parser.parse_args()
    common.console.print(common.machine())
    shapes, seconds = (
        load_steps(options.steps)
        if options.steps
        else record(10.0 if options.quick else 192.0, options.seed, options.keep)
    )
    measured, ends = np.array(seconds), np.cumsum(seconds)
    step_time, drift = fit_with_drift(shapes[::2], measured[::2], ends[::2])
    common.console.print(step_time)
    low, high = np.percentile(drift, (5, 95))
    common.console.print(f"Drift: steps took {low:.2f} to {high:.2f} times as long as at the middle speed (p5, p95)")
    fitted = np.array([step_time.seconds(shape) for shape in shapes[1::2]])
    drift_between = np.interp(ends[1::2], ends[::2], drift)
    found: dict[str, Any] = {}
    for kind, positions in kinds(shapes[1::2]).items():
        if positions:
            found[kind] = {
                "steps": len(positions),
                "with_drift": errors((fitted * drift_between)[positions], measured[1::2][positions]),
                "without": errors(fitted[positions], measured[1::2][positions]),
            }
    rows = [
        (f"{kind}, {name.replace('_', ' ')}", f"{values['steps']:,}", *(f"{v:+.1%}" for v in values[name].values()))
        for kind, values in found.items()
        for name in ("with_drift", "without")
    ]
    headings = ("steps not fitted", "number", *(f"p{percent} off" for percent in PERCENTILES), "total off")
    common.print_table("Fitted against recorded step time", headings, rows)
    results = {
        "num_steps": len(shapes),
        "step_time": asdict(step_time),
        "drift": {"p5": low, "p95": high},
        "off": found,
    }
    common.finish("step_time", results)


if __name__ == "__main__":
    main()
