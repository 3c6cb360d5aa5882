"""Kernels for the CPU in C++, compiled where they run."""
