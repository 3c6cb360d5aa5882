"""Fixtures for every test folder."""

pytest_plugins = ["cluster.fixtures", "harness.fixtures"]
