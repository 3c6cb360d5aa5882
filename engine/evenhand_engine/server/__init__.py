"""The HTTP side: listeners, the two aiohttp applications (public and admin), API servers, start-up and drain.

Lives in the HTTP process, on its event loop; with `--api-server-count` above 1 the public application is that of each
`api_server`, or of a sidecar's each `sidecar_server`, a process of its own, which the owner starts and looks after by `api_servers`.
Owns sockets and the order in which everything starts and stops; wires the rooms below together, decides nothing about a request.
"""
