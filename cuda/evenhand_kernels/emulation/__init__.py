"""CUDA on a CPU: kernels compiled by the host's C++ compiler, run thread by thread, with every access checked.

`build` compiles, `device` takes the place of a GPU.
"""
