"""`make gpu`: all that only a GPU can show, in one run of at most 8 minutes: correctness first, then the numbers.

Each part is a process with its own time limit; what it has printed by then is kept, whatever becomes of it or of later parts.
The figures, with the device's name, go to benchmarks/results/ as JSON, and a plot of each kernel against its ceiling beside
it. The exit status is 1 where a kernel or the engine is wrong, or a part did not end well.

    --device emulated   rehearse on the CPU, with tiny sizes: that the script runs is all that this shows
    --only NAME         this part alone; may be given several times
    --out DIR           where results go
"""

import argparse
import json
import os
import re
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from gpu_parts import HERE, Part, run, stoppable, write

TOTAL_SECONDS = 470.0
PATIENCE = {"cuda": 1, "emulated": 4}
"""How many times its limits each part may take: a rehearsal may have to compile on a slow machine."""

WATCHED = (
    *("--tool", "memcheck", "--target-processes", "all", "--error-exitcode", "9", "--print-limit", "5"),
    *("--launch-timeout", "0"),  # it gives up on a process that has not come to CUDA after 10 s, in silence
    *("--report-api-errors", "no"),  # torch and CuPy ask for functions that a driver may not have
)
"""Options of compute-sanitizer."""

DEVICE = Part("device", ("gpu_common.py",), 60, ("device",))
"""A process too: what asks for the device holds it as long as it lives."""


def parts() -> list[Part]:
    """In order: what must be right, then what is measured, the most telling first."""
    sanitizer = shutil.which("compute-sanitizer")
    return [
        Part("cases", ("gpu_correctness.py",), 90, ("cases",)),
        Part("parity", ("gpu_correctness.py", "--part", "parity"), 60, ("parity",)),
        Part("kernels", ("gpu_kernels.py",), 60, ("decode", "prefill", "memory")),
        Part("engine-1b", ("gpu_engine.py", "--shape", "1b"), 90, _of_engine("1b")),
        Part(
            "incident",
            ("gpu_incident.py",),
            140,
            ("incident_fair", "incident_fcfs", "long_prompt", "batching"),
        ),
        Part("engine-8b", ("gpu_engine.py", "--shape", "8b"), 140, _of_engine("8b")),
        Part(
            "sanitizer",
            ("gpu_correctness.py", "--cases", "few"),
            60,
            ("sanitized",),
            (sanitizer, *WATCHED) if sanitizer else None,
            proof="ERROR SUMMARY: 0 errors",
            marker="=========",
            environment={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},  # so that every tensor has bounds of its own
        ),
    ]


def _of_engine(shape: str) -> tuple[str, ...]:
    return f"decode_step_{shape}", f"throughput_{shape}", f"transformers_{shape}"


def wrong(figures: dict[str, Any]) -> list[str]:
    """What the correctness parts found."""
    failed = [str(case) for name in ("cases", "sanitized") for case in _object(figures, name).get("failed", [])]
    tokens = _object(figures, "parity").get("wrong", 0)
    return failed + ([f"{tokens} tokens of the engine are not transformers'"] if tokens else [])


def _object(figures: dict[str, Any], name: str) -> dict[str, Any]:
    found = figures.get(name)
    return found if isinstance(found, dict) else {}


def device_name(options: tuple[str, ...], limit: float) -> str:
    """Raises SystemExit with one line on what this machine lacks."""
    ended = run(DEVICE, options, limit)
    if ended.problem is None:
        return str(ended.figures["device"])
    problem = re.sub("^exit status 1: ", "", ended.problem)
    if re.match(r"(ImportError|ModuleNotFoundError): ", problem):
        problem += ": install torch, transformers and CuPy, and run `make gpu-wheels` where there is a network"
    raise SystemExit(f"make gpu: {problem}")


def plot(results: Path) -> None:
    """Each kernel's part of its ceiling, as bars, beside the JSON. Raises ImportError without matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figures = json.loads(results.read_text())
    decode = {f"attention, {name}": found for name, found in _object(figures, "decode").items()}
    bars = {name: found["of_copy_rate"] for name, found in (decode | _object(figures, "memory")).items()}
    if (of_flash := _object(figures, "prefill").get("of_flash")) is not None:
        bars["attention, prompt (of torch's flash)"] = of_flash
    figure, axes = pyplot.subplots(figsize=(9, 0.6 + 0.4 * len(bars)), layout="constrained")
    axes.barh(list(bars)[::-1], [100 * value for value in bars.values()][::-1], color="tab:green")
    axes.axvline(100, color="black", linewidth=1)
    axes.set(xlabel="% of the device's copy rate, measured in the same run")
    axes.set_title(f"Kernels against their ceilings on {figures['device']}")
    figure.savefig(results.with_suffix(".png"), dpi=120)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "emulated"), default="cuda")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", action="append", choices=[part.name for part in parts()])
    parser.add_argument("--out", type=Path, default=HERE / "results")
    parser.add_argument("--plot", type=Path, metavar="JSON", help="only draw what another machine has measured")
    options = parser.parse_args()
    if options.plot is not None:
        plot(options.plot)
        return 0
    with stoppable():
        return measure(options.device, options.seed, options.only, options.out)


def measure(device: str, seed: int, only: list[str] | None, out: Path) -> int:
    """The exit status."""
    ends_at = time.monotonic() + TOTAL_SECONDS * PATIENCE[device]
    told = ("--device", device, "--seed", str(seed))
    figures: dict[str, Any] = {"benchmark": "gpu", "device": device_name(told, DEVICE.seconds * PATIENCE[device])}
    path = out / f"{re.sub('[^a-z0-9]+', '-', figures['device'].lower())}.json"
    fixed = figures | {"parts": {}}
    problems, unwritten = [], None
    for part in parts():
        if only and part.name not in only:
            continue
        ended = run(part, told, min(part.seconds * PATIENCE[device], ends_at - time.monotonic()))
        fixed["parts"][part.name] = {"seconds": round(ended.seconds, 1), "problem": ended.problem}
        if ended.problem and ended.report:
            fixed["parts"][part.name]["report"] = ended.report
        figures |= ended.figures | fixed
        problems += [f"{part.name}: {ended.problem}"] if ended.problem else []
        print(f"{part.name}: {ended.seconds:.0f} s{f', {ended.problem}' if ended.problem else ''}", file=sys.stderr)
        unwritten = write(path, figures)
        if ended.stopped:
            break
    problems += wrong(figures) + ([unwritten] if unwritten else [])
    try:
        plot(path)
    except ImportError:  # as on a GPU pod
        print(f"no matplotlib here: where it is, draw with benchmarks/gpu.py --plot {path.name}", file=sys.stderr)
    except Exception as error:  # a picture can be drawn again
        print(f"no plot: {type(error).__name__}: {error}", file=sys.stderr)
    for problem in problems:
        print(problem, file=sys.stderr)
    print(json.dumps(figures))
    return int(bool(problems))


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(main())
