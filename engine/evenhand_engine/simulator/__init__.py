"""Discrete-event simulation of the engine: the code that serves, in virtual time, on a modelled device.

    what is asked    traces: of a file, or made by workloads; scenario: all but who goes first
    who computes     device, a model of step times (calibration, drift: how it is fitted); simulation; sidecar: its dispatcher before one
    what came of it  measures, fluid: what ideal sharing gives; report

Lives in `evenhand simulate` and in benchmarks. `measures` says how fair a run was; `published` holds other people's schedulers.
"""
