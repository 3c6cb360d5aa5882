"""Kernels in CUDA C++ (*.cu, one each; *.cuh, what they share), their launchers, and the plan of attention's work.

`kernels` launches them, `sampling` and `quantized` those of their names; `source` reads a kernel, `variants` says which runs where and
`choice` which is fastest; `work` plans attention: `units`, by numpy or by `native_plan`; `device` is a GPU.
"""
