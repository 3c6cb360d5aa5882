"""The operator and engine pods as tests need them, on top of the control plane of `cluster`."""
