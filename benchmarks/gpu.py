"""`make gpu`: all that only a GPU can show, in one run of at most 8 minutes: correctness first, then the numbers.

Each part is a process with its own time limit; what it has printed by then is kept, whatever becomes of it or of later parts.
The figures, with the device's name, go to benchmarks/results/ as JSON, and a plot of each kernel against its ceiling beside
it. The exit status is 1 where a kernel or the engine is wrong, or a part did not end well.

    --device emulated   rehearse on the CPU, with tiny sizes: that the script runs is all that this shows
    --only NAME         this part alone; may be given several times
    --out DIR           where results go
"""

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
TOTAL_SECONDS = 470.0
PATIENCE = {"cuda": 1, "emulated": 4}
"""How many times its limits each part may take: a rehearsal may have to compile on a slow machine."""


@dataclass(frozen=True)
class Part:
    """One process. `program` comes before the interpreter; None: it is not on this machine, and the part is left out."""

    name: str
    arguments: tuple[str, ...]
    seconds: float
    program: tuple[str, ...] | None = ()


@dataclass
class Ended:
    """How a part ended: `problem` None is well."""

    seconds: float
    problem: str | None
    figures: dict[str, Any] = field(default_factory=dict)


def parts() -> list[Part]:
    """In order: what must be right, then what is measured, the most telling first."""
    sanitizer = shutil.which("compute-sanitizer")
    watched = (sanitizer, "--error-exitcode", "9", "--print-limit", "5") if sanitizer else None
    return [
        Part("cases", ("gpu_correctness.py",), 90),
        Part("parity", ("gpu_correctness.py", "--part", "parity"), 60),
        Part("kernels", ("gpu_kernels.py",), 60),
        Part("engine-1b", ("gpu_engine.py", "--shape", "1b"), 90),
        Part("incident", ("gpu_incident.py",), 140),
        Part("engine-8b", ("gpu_engine.py", "--shape", "8b"), 140),
        Part("sanitizer", ("gpu_correctness.py", "--cases", "few"), 60, watched),
    ]


def run(part: Part, device: str, seed: int, left: float) -> Ended:
    """Start it and gather its figures until it ends or its time is up."""
    if part.program is None:
        return Ended(0.0, None, {f"{part.name}_left_out": "its program is not on this machine"})
    if left <= 0:
        return Ended(0.0, "no time was left for it")
    script, *arguments = part.arguments
    limit = min(part.seconds * PATIENCE[device], left)
    command = [*part.program, sys.executable, str(HERE / script), *arguments, "--device", device, "--seed", str(seed)]
    started_at = time.monotonic()
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as log:
        problem = None
        process = subprocess.Popen(command, stdout=out, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True)
        try:
            status = process.wait(timeout=limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # with the processes that it has started, which hold the device too
            process.wait()
            problem = f"its {limit:.0f} s were up"
        else:
            if status:
                problem = f"exit status {status}: {last_line(log)}"
        seconds = time.monotonic() - started_at
        out.seek(0)
        return Ended(seconds, problem, figures_of(out.read()))


def figures_of(output: str) -> dict[str, Any]:
    """The lines that are JSON objects, as one; a line cut off by the time limit is none."""
    figures: dict[str, Any] = {}
    for line in output.splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            found = json.loads(line)
            figures |= found if isinstance(found, dict) else {}
    return figures


def last_line(log: Any) -> str:
    log.seek(0)
    return next((line.strip() for line in reversed(log.read().splitlines()) if line.strip()), "no message")


def wrong(figures: dict[str, Any]) -> list[str]:
    """What the correctness parts found."""
    failed = [case for name in ("cases", "sanitized") for case in figures.get(name, {}).get("failed", [])]
    tokens = figures.get("parity", {}).get("wrong", 0)
    return failed + ([f"{tokens} tokens of the engine are not transformers'"] if tokens else [])


def device_name(device: str) -> str:
    """Raises SystemExit with one line on what this machine lacks."""
    try:
        from gpu_common import Options

        from evenhand_kernels.device import DeviceError
    except ImportError as error:
        raise SystemExit(
            f"make gpu: {error}: install torch, transformers and CuPy, and run `make gpu-wheels` where there is a network"
        ) from error
    try:
        return Options(device, 0).make_device().name
    except DeviceError as error:
        raise SystemExit(f"make gpu: {error}") from error


def plot(results: Path) -> None:
    """Each kernel's part of its ceiling, as bars, beside the JSON. Raises ImportError without matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figures = json.loads(results.read_text())
    found = figures.get("decode", {}) | figures.get("memory", {})
    bars = {
        f"attention, {name}" if name in figures.get("decode", {}) else name: f["of_copy_rate"]
        for name, f in found.items()
    }
    if "prefill" in figures:
        bars["attention, prompt (of torch's flash)"] = figures["prefill"]["of_flash"]
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
    figures: dict[str, Any] = {"benchmark": "gpu", "device": device_name(options.device), "parts": {}}
    path = options.out / f"{re.sub('[^a-z0-9]+', '-', figures['device'].lower())}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    ends_at = time.monotonic() + TOTAL_SECONDS * PATIENCE[options.device]
    problems = []
    for part in parts():
        if options.only and part.name not in options.only:
            continue
        ended = run(part, options.device, options.seed, ends_at - time.monotonic())
        figures |= ended.figures
        figures["parts"][part.name] = {"seconds": round(ended.seconds, 1), "problem": ended.problem}
        problems += [f"{part.name}: {ended.problem}"] if ended.problem else []
        print(f"{part.name}: {ended.seconds:.0f} s{f', {ended.problem}' if ended.problem else ''}", file=sys.stderr)
        path.write_text(json.dumps(figures, indent=2) + "\n")
    problems += wrong(figures)
    try:
        plot(path)
    except ImportError:  # as on a GPU pod
        print(f"no matplotlib here: where it is, draw with benchmarks/gpu.py --plot {path.name}", file=sys.stderr)
    for problem in problems:
        print(problem, file=sys.stderr)
    print(json.dumps(figures))
    return int(bool(problems))


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(main())
