"""Kernels in CUDA C++ (*.cu, one each; *.cuh, what they share), their launchers, and the plan of attention's work."""
