"""The operator's own port: what it answers, whatever addresses the machine has."""

import errno
import socket
from typing import Any

import aiohttp
import pytest

from evenhand_operator.cache import Cache
from evenhand_operator.web_server import Health, listen, serving


def reachable(host: str, port: int) -> bool:
    try:
        with socket.create_connection((host, port), timeout=60):
            return True
    except OSError:
        return False


def test_all_addresses_are_those_of_both_families() -> None:
    with listen("::", 0) as listener:
        port = listener.getsockname()[1]
        assert reachable("127.0.0.1", port)
        assert reachable("::1", port) is (listener.family is socket.AF_INET6)


@pytest.mark.parametrize("code", [errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL])
def test_machine_without_ipv6_listens_on_ipv4(monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    create = socket.create_server

    def create_server(address: Any, **options: Any) -> socket.socket:
        if options.get("family") is socket.AF_INET6:
            raise OSError(code, "no IPv6 here")
        return create(address, **options)

    monkeypatch.setattr(socket, "create_server", create_server)
    with listen("::", 0) as listener:
        assert reachable("127.0.0.1", listener.getsockname()[1])


def test_one_address_is_that_one() -> None:
    with listen("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        assert reachable("127.0.0.1", port)
        assert not reachable("127.0.0.2", port)


def test_port_that_is_taken_is_an_error() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(OSError, match="in use"):
        listen("127.0.0.1", taken.getsockname()[1])


async def test_probes_say_what_is_wrong(cache: Cache) -> None:
    wrong: str | None = None
    health = Health(alive=lambda: wrong, ready=lambda: "not everything is listed yet")
    async with serving("127.0.0.1", 0, cache, health) as port, aiohttp.ClientSession() as session:

        async def ask(path: str) -> tuple[int, str]:
            async with session.get(f"http://127.0.0.1:{port}{path}") as response:
                return response.status, await response.text()

        assert await ask("/healthz") == (200, "ok")
        assert await ask("/readyz") == (503, "not everything is listed yet")
        wrong = "nothing was built for too long"
        assert await ask("/healthz") == (503, wrong)
        assert "evenhand_operator_is_leader" in (await ask("/metrics"))[1]
