"""Ports of this machine that nobody uses."""

import random
import socket


def free_ports(count: int) -> list[int]:
    """Different TCP ports of 127.0.0.1 that nothing listens on.

    They are below those that the kernel hands to outgoing connections: while the API server is down, one of its clients
    could otherwise be given the very port that it is to come back on.
    """
    ports: list[int] = []
    while len(ports) < count:
        candidate = random.randrange(15_000, 32_000)
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", candidate))
            except OSError:
                continue
        if candidate not in ports:
            ports.append(candidate)
    return ports
