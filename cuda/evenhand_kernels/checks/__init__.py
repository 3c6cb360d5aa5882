"""Checks of the CUDA kernels: cases against float64, mutants that the cases must catch, and what compilers say of them.

`case` is one; those of `attention`, `elementwise`, `sampling`, `quantized`. `mutants` change a kernel; `compiled` reads machine code.
"""
