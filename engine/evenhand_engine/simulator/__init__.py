"""Discrete-event simulation of the engine: the code that serves, in virtual time, on a modelled device."""
