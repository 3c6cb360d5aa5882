"""The layout's traps and promises, checked by a machine."""

import ast
import importlib
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MAX_LINES = 300
PACKAGES = ("evenhand_policy", "evenhand_engine", "evenhand_kernels", "evenhand_operator")


def modules() -> list[str]:
    names = []
    for package in PACKAGES:
        path = importlib.import_module(package).__path__
        names += [package, *(module.name for module in pkgutil.walk_packages(path, prefix=f"{package}."))]
    return names


def loaded_by(statement: str) -> set[str]:
    """Top-level modules that a fresh interpreter has loaded after the statement."""
    code = f"{statement}\nimport sys\nprint(*{{name.partition('.')[0] for name in sys.modules}})"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=280)
    return set(run.stdout.split())


@pytest.mark.parametrize("folder", ["operator", "cuda", "tests", "e2e"])
def test_folders_that_would_shadow_packages_are_none(folder: str) -> None:
    assert not (ROOT / folder / "__init__.py").exists()


def test_the_standard_library_wins_at_the_root() -> None:
    subprocess.run([sys.executable, "-c", "import operator; operator.eq"], cwd=ROOT, check=True, timeout=280)


def test_no_module_is_named_like_the_standard_librarys() -> None:
    stems = {path.stem for package in ("engine", "operator", "cuda") for path in (ROOT / package).rglob("*.py")}
    assert not (stems - {"__init__", "__main__"}) & (set(sys.stdlib_module_names) - {"operator"})


@pytest.mark.parametrize("name", modules())
def test_every_module_says_what_it_is(name: str) -> None:
    spec = importlib.util.find_spec(name)
    assert spec is not None and spec.origin is not None
    assert ast.get_docstring(ast.parse(Path(spec.origin).read_text(encoding="utf-8")))


@pytest.mark.parametrize("name", PACKAGES)
def test_every_room_tells_a_newcomer_what_is_in_it(name: str) -> None:
    [place] = importlib.import_module(name).__path__
    for room in Path(place).rglob("__init__.py"):
        told = re.findall(r"\w+", ast.get_docstring(ast.parse(room.read_text(encoding="utf-8"))) or "")
        rooms = {inner.parent.name for inner in room.parent.glob("*/__init__.py")}
        inside = {module.stem for module in room.parent.glob("*.py")} | rooms
        assert inside - {"__init__", "__main__"} - set(told) == set(), room


@pytest.mark.parametrize("folder", ["engine", "operator", "cuda", "benchmarks", "tools", "tests", "e2e"])
def test_no_file_is_too_long(folder: str) -> None:
    """Split by noun: who looks for one thing should not have to read two."""
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in (ROOT / folder).rglob("*.py")}
    assert lengths
    assert [f"{path}: {length} lines" for path, length in lengths.items() if length > MAX_LINES] == []


def test_the_policy_contract_is_light() -> None:
    loaded = loaded_by("import evenhand_policy.compile, evenhand_policy.files, evenhand_policy.config")
    assert not loaded & {"torch", "numpy", "transformers", "aiohttp", "kopf", "kubernetes"}


def test_the_command_line_answers_without_loading_a_model() -> None:
    assert not loaded_by("import evenhand_engine.commands.cli") & {"torch", "transformers", "numpy", "aiohttp"}


def test_the_scheduler_knows_no_device() -> None:
    assert not loaded_by("import evenhand_engine.scheduler.scheduler") & {
        "torch",
        "numpy",
        "cupy",
        "asyncio",
        "aiohttp",
    }


def test_the_core_imports_torch_only_once_it_searches_for_no_garbage() -> None:
    assert not loaded_by("import evenhand_engine.core.engine") & {"torch", "numpy"}


def test_the_operator_loads_no_model() -> None:
    assert not loaded_by("import evenhand_operator") & {"torch", "transformers", "cupy", "evenhand_engine"}


def test_every_test_file_has_tests() -> None:
    for path in [*ROOT.glob("tests/**/test_*.py"), *ROOT.glob("e2e/**/test_*.py")]:
        names = {
            node.name
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        }
        assert any(name.startswith("test_") for name in names), f"{path} holds no test"
