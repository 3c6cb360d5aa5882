"""CUDA kernels, their launchers, their reference implementations, and the CPU kernels that stand in for them.

kernels, quantized             what a decoder needs of a device, whatever computes it; weights as codes
drawing, logarithms            tokens, and how likely they were, by rows of logits, in numpy and torch
reference                      the same in plain torch: what all others are tested against
cpu/                           in C++ for the CPU
device                         what the GPU engine asks of a device: memory, streams, graphs, launches
cuda/                          kernels in CUDA C++ and their launchers; `cuda.device`, an NVIDIA GPU, or why
                                   there is none to use; `cuda.choice`, the fastest of several that do the same
emulation/                     the same kernels on the CPU, every access checked; `emulation.device`
checks/                        cases, mutants, and what the compiler makes of every variant
"""
