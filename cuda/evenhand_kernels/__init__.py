"""CUDA kernels, their launchers, their reference implementations, and the CPU kernels that stand in for them."""
