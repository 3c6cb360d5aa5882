"""docs/reliability.md names tests that exist, and every test of a fault is named there."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NAMED = re.findall(r"`([\w/]+\.py)::(\w+)`", (ROOT / "docs/reliability.md").read_text())
ALL_NAMED = ("e2e/test_operator_faults.py", "e2e/test_operator_outages.py")


def functions_of(path: str) -> set[str]:
    """Names of the test functions in a file."""
    nodes = ast.parse((ROOT / path).read_text()).body
    functions = (node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))
    return {name for name in functions if name.startswith("test_")}


@pytest.mark.parametrize("path", sorted({path for path, _ in NAMED}))
def test_named_tests_exist(path: str) -> None:
    assert {name for named, name in NAMED if named == path} <= functions_of(path)


@pytest.mark.parametrize("path", ALL_NAMED)
def test_tests_of_faults_are_named(path: str) -> None:
    assert functions_of(path) <= {name for named, name in NAMED if named == path}
