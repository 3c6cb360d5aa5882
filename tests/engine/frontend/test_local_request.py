"""Which requests come from this machine."""

from types import SimpleNamespace

import pytest
from aiohttp import web
from aiohttp.test_utils import make_mocked_request

from evenhand_engine.frontend.local_request import is_local
from evenhand_policy.push_protocol import (
    REPORT_PATH,
)


@pytest.mark.parametrize("address", ["127.0.0.1", "::1", "::ffff:127.0.0.1"])
def test_this_machine_is_local(address: str) -> None:
    assert is_local(request_from(address))


def test_a_web_page_that_rebinds_its_name_to_this_machine_is_not() -> None:
    request = request_from("127.0.0.1").clone(headers={"Host": "attacker.example"})
    assert not is_local(request)


@pytest.mark.parametrize("header", ["X-Forwarded-For", "forwarded", "Via", "x-forwarded-client-cert"])
def test_what_a_proxy_on_this_machine_passes_on_is_not(header: str) -> None:
    request = request_from("127.0.0.1").clone(headers={"Host": "localhost:9000", header: "x"})
    assert not is_local(request)


@pytest.mark.parametrize("address", ["127.0.0.6", "10.0.0.1", "192.168.1.1", "fe80::1", "", "nonsense"])
def test_others_are_not(address: str) -> None:
    """A sidecar of Istio's hands on everybody's connections from 127.0.0.6."""
    assert not is_local(request_from(address))


def request_from(address: str) -> web.Request:
    transport = SimpleNamespace(
        get_extra_info=lambda name, default=None: (address, 1) if name == "peername" else default
    )
    return make_mocked_request("GET", REPORT_PATH, headers={"Host": "localhost:9000"}, transport=transport)
