"""The contract is cheap to load and stands on nothing but msgspec and PyYAML; what signs, on cryptography too."""

import subprocess
import sys

LOAD_ALL = """
import importlib, pkgutil, sys
before = set(sys.modules)
import evenhand_policy
for module in pkgutil.iter_modules(evenhand_policy.__path__):
    if module.name not in ("bootstrap", "push_protocol", "signatures"):
        importlib.import_module(f"evenhand_policy.{module.name}")
loaded = {name.partition(".")[0] for name in set(sys.modules) - before}
print(*sorted(loaded - set(sys.stdlib_module_names)))
"""


def test_only_the_standard_library_msgspec_and_yaml_are_loaded() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", LOAD_ALL], capture_output=True, text=True, check=True, timeout=280
    )
    loaded = {name for name in done.stdout.split() if not name.strip("_").startswith("cython")}
    assert loaded <= {"_yaml", "evenhand_policy", "msgspec", "typing_extensions", "yaml"}
    assert "evenhand_policy" in done.stdout
