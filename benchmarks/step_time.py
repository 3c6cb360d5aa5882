"""The step time of this machine: records a run of the real engine and fits the simulator's linear step time to it.

Clients in a closed loop mix short and long prompts with short and long outputs, so that steps of every kind come: decodes
alone, chunks of prompts behind contexts, and both together. Every second step is fitted, the others tell how well it
fits. The preset `cpu-135m` is made by this command.

    --steps FILE   fit a recording that exists (`evenhand serve --record-steps FILE`)
"""

import asyncio
import random
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import common
import numpy as np
import serving

from evenhand_engine.simulator.device import LinearStepTime, StepShape, fit_step_time
from evenhand_engine.step_recorder import load_steps

NUM_CLIENTS = 8
PROMPTS = (16, 64, 200, 600, 1_500)
OUTPUTS = (16, 64, 128)
PERCENTILES = (10, 50, 90, 99)


async def load(server: serving.Server, seconds: float, seed: int) -> None:
    """Keep the clients busy for some seconds."""
    rng = random.Random(seed)

    async def client() -> None:
        async with server.client("none") as openai_client:
            while True:
                prompt = [rng.randrange(1_000, 40_000) for _ in range(rng.choice(PROMPTS))]
                await serving.stream(openai_client, serving.Timing(time.monotonic()), prompt, rng.choice(OUTPUTS))

    tasks = [asyncio.create_task(client()) for _ in range(NUM_CLIENTS)]
    await asyncio.sleep(seconds)
    await serving.cancel(tasks)


def record(seconds: float, seed: int) -> tuple[list[StepShape], list[float]]:
    """The steps of a run of that long on the default model."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "steps.csv"
        with serving.serve("--record-steps", str(path), "--no-enable-prefix-caching") as server:
            asyncio.run(load(server, seconds, seed))
        return load_steps(path)


def errors(step_time: LinearStepTime, shapes: Sequence[StepShape], seconds: Sequence[float]) -> dict[str, float]:
    """Relative errors of single steps by percentile, and of all steps' time together."""
    fitted = np.array([step_time.seconds(shape) for shape in shapes])
    off = fitted / np.array(seconds) - 1.0
    single = {f"p{percent}": float(np.percentile(off, percent)) for percent in PERCENTILES}
    return {**single, "total": float(fitted.sum() / sum(seconds) - 1.0)}


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
    options = parser.parse_args()
    common.console.print(common.machine())
    shapes, seconds = (
        load_steps(options.steps) if options.steps else record(10.0 if options.quick else 120.0, options.seed)
    )
    step_time = fit_step_time(shapes[::2], seconds[::2])
    common.console.print(step_time)
    found: dict[str, Any] = {}
    for kind, positions in kinds(shapes[1::2]).items():
        if positions:
            held_out = [shapes[1::2][i] for i in positions], [seconds[1::2][i] for i in positions]
            found[kind] = {"steps": len(positions), **errors(step_time, *held_out)}
    rows = [
        (kind, f"{values['steps']:,}", *(f"{value:+.1%}" for name, value in values.items() if name != "steps"))
        for kind, values in found.items()
    ]
    headings = ("steps not fitted", "number", *(f"p{percent} off" for percent in PERCENTILES), "total off")
    common.print_table("Fitted against recorded step time", headings, rows)
    common.finish("step_time", {"num_steps": len(shapes), "off": found})


if __name__ == "__main__":
    main()
