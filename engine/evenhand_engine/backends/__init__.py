"""Whoever generates. Today: the engine core in its own process, over a pipe.

Lives in the HTTP process. Owns the streams of the requests in flight.
"""
