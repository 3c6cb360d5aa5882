"""The HTTP process: listeners, the two aiohttp applications (public and admin), start-up and drain.

Lives in the HTTP process, on its event loop. Owns sockets and the order in which everything starts and stops; wires the
rooms below together, decides nothing about a request.
"""
