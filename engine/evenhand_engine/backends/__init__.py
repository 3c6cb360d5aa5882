"""Whoever generates, behind one protocol: `backend.Backend`. The engine core in a process of its own, over a pipe.

    frontend, openai ──▶ Backend.generate(request, observer) ──▶ Stream of Delta, read at the client's pace
                                        └─▶ Observer: starts, tokens and the end, told as they happen

Lives in the HTTP process, on its event loop. Owns the streams of the requests in flight. What a request used is what its
Observer was told, never what its client read: a client that does not read costs a coalescing record, and changes no count.
`local` is the engine's own: the pipe (`engine_client`, and `inbox` between its thread and the loop), and one request's outputs (`stream`),
which the detokenizer of `text` turns into text and matches against stop strings.

Beside them, for the sidecar, the way to an engine that somebody else wrote: `upstream`, its queue and what is in flight there;
`upstream_connection`, HTTP from one process, by a `pool` of connections; `upstream_metrics`, what it says of itself.
"""
