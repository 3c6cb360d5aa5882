"""The command line. Parses arguments and nothing else; each command is a module and loads what it needs when it runs.

`cli` is the group of them: `serve`, `sidecar`, `simulate`, `lint`. `options`: what both servers have.
"""
