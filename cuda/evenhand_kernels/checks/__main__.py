"""`make kernels`: all that can be said of the CUDA kernels without a GPU, as one table and JSON.

What every variant compiles to for each architecture, every case under the emulation, and every mutant. Takes a quarter of an
hour at first and less than half of that with the compilers' results remembered.
"""

import argparse
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from rich.console import Console
from rich.table import Table

from evenhand_kernels.checks.compiled import ARCHITECTURES, Compiled, compile_variant, faults, shipped
from evenhand_kernels.checks.mutants import CASES, MUTANTS, caught_by
from evenhand_kernels.cpu.cores import num_cores
from evenhand_kernels.emulation.device import EmulatedDevice, EmulationError


def main(cache_dir: Path) -> int:
    """The exit status: 1 if anything is not as it must be. JSON goes to standard output, the rest to standard error."""
    console = Console(stderr=True)
    problems: list[str] = []
    with ThreadPoolExecutor(num_cores()) as pool:
        jobs = [(variant, architecture) for architecture in ARCHITECTURES for variant in shipped(architecture)]
        compiled = list(pool.map(lambda job: compile_variant(job[0], job[1], cache_dir / "compiled"), jobs))
        for (variant, architecture), result in zip(jobs, compiled, strict=True):
            problems += [f"{variant}, {architecture}: {fault}" for fault in faults(variant, result)]
        console.print(_table(compiled))
        failed = []
        for case in CASES:
            try:
                case.run(EmulatedDevice(cache_dir / "emulation", seed=1))
            except (AssertionError, EmulationError) as error:
                failed.append(f"{case}: {error}")
        catches = list(pool.map(lambda mutant: caught_by(mutant, cache_dir / "emulation"), MUTANTS))
    problems += failed
    problems += [f"no case notices {mutant}" for mutant, catch in zip(MUTANTS, catches, strict=True) if catch is None]
    for problem in problems:
        console.print(problem, style="red", markup=False)
    summary = {
        "variants": len(compiled),
        "spills": sum(result.spill_bytes > 0 for result in compiled),
        "cases": len(CASES),
        "cases_failed": len(failed),
        "mutants": len(MUTANTS),
        "mutants_caught": sum(catch is not None for catch in catches),
    }
    sys.stdout.write(json.dumps(summary) + "\n")
    return int(bool(problems))


def _table(compiled: list[Compiled]) -> Table:
    table = Table("variant", "for", "registers", "shared", "blocks", "spilled", "16-byte loads", "products")
    for one in compiled:
        numbers = (one.registers, one.shared_bytes, one.blocks, one.spill_bytes, one.wide_loads, one.products)
        table.add_row(one.variant, one.architecture, *map(str, numbers))
    return table


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cache_dir", type=Path, help="where what was compiled is kept")
    sys.exit(main(parser.parse_args().cache_dir))
