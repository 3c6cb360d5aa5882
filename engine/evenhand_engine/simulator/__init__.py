"""Discrete-event simulation of the engine: the code that serves, in virtual time, on a modelled device.

Lives in `evenhand simulate` and in benchmarks. `measures` says how fair a run was; `published` holds other people's schedulers.
"""
