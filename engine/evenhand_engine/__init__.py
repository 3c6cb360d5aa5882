"""The inference engine: OpenAI-compatible server, fair scheduler, model runner, simulator and command line.

A room is a folder, and imports only rooms below it (import contracts in pyproject.toml):

    commands    the command line, a file a command
    server      the HTTP processes, the engine's and the sidecar's: applications, listeners, start-up, drain, admin port
    sidecar     requests passed on to an engine that somebody else wrote
    anthropic   /v1/messages: another wire format, in terms of openai's
    openai      the wire format: requests in, answers and streams out
    frontend    what happens at the door: identity, quotas, the config in force, metrics
    backends    whoever generates, behind one protocol: the engine core in its own process, or an upstream over HTTP
    core        the engine core process: its loop, the runner, sampling, statistics
    simulator   virtual time, beside `messages`: what crosses the pipe between the two processes
    dispatch    pure: who is sent next to somebody else's engine; beside `structured`: grammars that outputs must follow
    scheduler   pure: who computes what, every step; beside `model` (checkpoints, decoder) and `text` (tokenizer)
    config, errors, logs, signals, csv_rows; `__main__` is where the process begins
"""
