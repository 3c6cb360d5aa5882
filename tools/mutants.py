"""Mutants: are the tests of operator and policy noticing when the code is wrong?

Draws changes of the code, as Cosmic Ray makes them, with a fixed seed; applies each to a copy of the repository, and
runs the unit tests of what was changed there. `make mutants` prints each that no test noticed. Run by the interpreter
that has Cosmic Ray; the tests run in `.venv`.
"""

import argparse
import ast
import json
import os
import random
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import parso.python.tree  # noqa: F401  (first, or Cosmic Ray's own import of parso is circular)
from cosmic_ray.commands.init import _all_work_items
from cosmic_ray.mutating import mutate_and_test
from cosmic_ray.work_item import MutationSpec, TestOutcome

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {"operator/evenhand_operator": "tests/operator", "engine/evenhand_policy": "tests/policy"}
TESTS = ("tests/policy", "tests/operator", "tests/engine")
SCHEMA_TESTS = "tests/policy/test_crd.py"  # every annotation is in the committed CRDs
PATHS = ("operator", "engine", "cuda", "e2e", "tools")
_TEST_SECONDS = 180.0
# `X | None` is nearly always a type, and a decorator what a function is: neither says anything about tests
_UNTELLING = ("core/ReplaceBinaryOperator_BitOr_", "core/RemoveDecorator")


def main() -> int:
    """Returns 1 where a drawn mutant was noticed by no test."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--number", type=int, default=150, help="how many mutants to draw")
    parser.add_argument("--budget", type=float, default=3600, help="seconds after which no further one is tried")
    parser.add_argument("--only", default="", help="part of the path of the modules to mutate")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="evenhand-mutants-") as name:
        copy = Path(name)
        copy_repository(copy)
        os.chdir(copy)
        drawn = draw(options.only, options.number, options.seed)
        return report(run(drawn, options.budget), len(drawn))


def copy_repository(destination: Path) -> None:
    """All files that git knows, as they are in the working tree."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True, text=True).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (destination / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, destination / name)


def draw(only: str, number: int, seed: int) -> list[MutationSpec]:
    """So many of all mutants, each as likely as any other."""
    modules = sorted(path for package in PACKAGES for path in Path(package).glob("*.py") if only in str(path))
    found = [item.mutations[0] for item in _all_work_items(modules, {})]
    telling = [each for each in found if is_telling(each)]
    return random.Random(seed).sample(telling, min(number, len(telling)))


def is_telling(mutant: MutationSpec) -> bool:
    """Whether a test could notice: not what only type checkers read, nor the options of a class, such as frozen."""
    line = Path(mutant.module_path).read_text(encoding="utf-8").splitlines()[mutant.start_pos[0] - 1]
    return not mutant.operator_name.startswith(_UNTELLING) and not line.lstrip().startswith(("class ", "@dataclass("))


def run(mutants: Iterable[MutationSpec], budget: float) -> Iterator[tuple[MutationSpec, str, str]]:
    """Outcome of each mutant, and its difference."""
    deadline = time.monotonic() + budget
    paths = os.pathsep.join(str(Path.cwd() / each) for each in PATHS)
    for mutant in mutants:
        if time.monotonic() > deadline:
            return
        module = Path(mutant.module_path)
        for tests in (
            tests_of(module),
            [PACKAGES[str(module.parent)]],
        ):  # some importing no module by name see all of it
            command = f"{ROOT}/.venv/bin/pytest -q -x -p no:cacheprovider --hypothesis-seed=0 --timeout=60 {shlex.join(tests)}"
            result = mutate_and_test(
                [mutant], f"env PYTHONPATH={paths} PYTHONDONTWRITEBYTECODE=1 {command}", _TEST_SECONDS
            )
            if result.test_outcome != TestOutcome.SURVIVED:
                break
        outcome = result.test_outcome or TestOutcome.INCOMPETENT
        print(f"{outcome.value:12} {mutant.module_path}:{mutant.start_pos[0]} {mutant.operator_name}", flush=True)
        yield mutant, outcome.value, result.diff or ""


def tests_of(module: Path) -> list[str]:
    """Unit tests that import the module, or all of its package's where none does: it is used by the others."""
    folder = PACKAGES[str(module.parent)]
    name = ".".join(module.with_suffix("").parts[1:])
    files = sorted(
        path for each in TESTS for path in Path(each).rglob("*.py") if path.name.startswith(("test_", "conf"))
    )
    importing = [path for path in files if name in imports(path)]
    tests = [str(path) for path in importing if path.name.startswith("test_")]
    tests += [str(path.parent) for path in importing if path.name == "conftest.py" and str(path.parent) == folder]
    schema = [SCHEMA_TESTS] if folder == "tests/policy" and tests else []
    return [*schema, *tests] or [folder]


def imports(path: Path) -> set[str]:
    """Modules from which a file imports."""
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    return {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}


def report(outcomes: Iterator[tuple[MutationSpec, str, str]], num_drawn: int) -> int:
    """What was not noticed, and one JSON object at the end."""
    counts: Counter[str] = Counter()
    survivors = []
    for _, outcome, difference in outcomes:
        counts[outcome] += 1
        if outcome == TestOutcome.SURVIVED.value:
            survivors.append(difference)
    print("\n".join(["", *survivors]))
    tried = sum(counts.values())
    print(json.dumps({"drawn": num_drawn, "tried": tried, "survived": len(survivors), "outcomes": dict(counts)}))
    return int(bool(survivors))


if __name__ == "__main__":
    sys.exit(main())
