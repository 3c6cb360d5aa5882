"""Checks of the CUDA kernels: cases against float64, mutants that the cases must catch, and what compilers say of them."""
