"""Who computes what, every step. Pure: no clock, no randomness, no I/O, no numpy or torch; time is an argument.

Lives in the engine core process, in the simulator and in tests: all drive this very code. Imports the policy contract and
the engine's settings, nothing else of the engine.
"""
