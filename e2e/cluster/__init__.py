"""A real Kubernetes control plane for tests: built once, started for each test run, always stopped."""
