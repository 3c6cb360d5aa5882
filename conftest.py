"""Fixtures for every test folder."""

import sys

pytest_plugins = ["cluster.fixtures", "harness.fixtures", "harness.resident", "harness.node_fixtures", "harness.helm"]

# The reference, transformers, makes torch load triton's compiler, which no test needs and which prints pages about leaks
# when the interpreter ends: the summary, with what was skipped, would not be the last that one sees.
sys.modules["triton"] = None  # type: ignore[assignment]
