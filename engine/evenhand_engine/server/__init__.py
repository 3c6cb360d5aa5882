"""The HTTP side: listeners, the two aiohttp applications (public and admin), API servers, start-up and drain.

Lives in the HTTP process, on its event loop; with `--api-server-count` above 1 the public application is that of each
`api_server`, or of a sidecar's each `sidecar_server`, a process of its own, which the owner starts and looks after by `api_servers`.
Owns sockets and the order in which everything starts and stops; wires the rooms below together, decides nothing about a request.

    its life      startup, then run until a signal; listener: its sockets; loading: what they answer before there is an engine; tasks
    public port   app: routes and what stands around each: malformed, cors; information, openapi: what it says of itself
    the sidecar's sidecar_app, sidecar_startup
    admin port    admin
"""
