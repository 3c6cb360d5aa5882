"""Kernels for the CPU in C++, compiled where they run, or ahead of time for `levels` of processor.

`library` loads them, `native` is what they look like to Python, `kernels` calls them; `packed`: weights as they read them; `sampling`;
`cores`: how many threads.
"""
