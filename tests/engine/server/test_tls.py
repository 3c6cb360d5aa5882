"""TLS, and addresses and ports that cannot be served."""

import socket
import ssl
import time
from pathlib import Path

import httpx2
import pytest
import trustme

from evenhand_engine.config import EngineConfig
from evenhand_engine.errors import StartupError
from evenhand_engine.frontend.settings import ServerSettings
from evenhand_engine.server.startup import start_server

from .conftest import Say, Serve
from .scripted_core import WAIT_SECONDS, ScriptedCore


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


def test_tls(serve: Serve, say: Say, authority: trustme.CA, tmp_path: Path) -> None:
    certificate = authority.issue_cert("127.0.0.1")
    certfile, keyfile = tmp_path / "cert.pem", tmp_path / "key.pem"
    certfile.write_bytes(b"".join(blob.bytes() for blob in certificate.cert_chain_pems))
    certificate.private_key_pem.write_to_path(keyfile)
    server = serve(say("ok"), ssl_certfile=certfile, ssl_keyfile=keyfile)
    assert server.url.startswith("https://")
    context = ssl.create_default_context()
    authority.configure_trust(context)
    with httpx2.Client(verify=context) as http, server.client(http_client=http) as client:
        assert client.completions.create(model="tiny", prompt="x").choices[0].text == "ok"
        events = client.completions.create(model="tiny", prompt="x", stream=True)
        assert "".join(event.choices[0].text for event in events) == "ok"
    with pytest.raises(httpx2.ConnectError):
        httpx2.get(f"{server.url}/health")
    assert httpx2.get(f"{server.admin_url}/health").status_code == 200


@pytest.mark.parametrize("count", [1, 2])
def test_a_renewed_certificate_is_used(serve: Serve, say: Say, tmp_path: Path, count: int) -> None:
    combined = tmp_path / "tls.pem"

    def renew(authority: trustme.CA) -> ssl.SSLContext:
        fresh = tmp_path / "fresh"
        authority.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(fresh)
        fresh.replace(combined)
        context = ssl.create_default_context()
        authority.configure_trust(context)
        return context

    def is_used(context: ssl.SSLContext) -> bool:
        """By all processes, between which the kernel divides connections at random: one is left out once in 2**39."""
        try:
            return all(httpx2.get(f"{server.url}/health", verify=context).status_code == 200 for _ in range(40))
        except httpx2.ConnectError:
            return False

    renew(trustme.CA())
    server = serve(say("ok"), ssl_certfile=combined, api_server_count=count)
    context = renew(trustme.CA())
    deadline = time.monotonic() + WAIT_SECONDS
    while not is_used(context):
        assert time.monotonic() < deadline
    (tmp_path / "fresh").write_text("garbage")
    (tmp_path / "fresh").replace(combined)
    assert is_used(context)


def test_unusable_tls_files(serve: Serve, say: Say, tmp_path: Path) -> None:
    with pytest.raises(StartupError, match="certificate"):
        serve(say("ok"), ssl_certfile=tmp_path / "missing.pem")
    (tmp_path / "garbage.pem").write_text("garbage")
    with pytest.raises(StartupError, match="certificate"):
        serve(say("ok"), ssl_certfile=tmp_path / "garbage.pem")
    with pytest.raises(StartupError, match="--ssl-certfile"):
        serve(say("ok"), ssl_keyfile=tmp_path / "garbage.pem")  # plain HTTP is not what was asked for


@pytest.mark.parametrize("flag", ["port", "admin_port"])
def test_port_in_use(serve: Serve, say: Say, flag: str) -> None:
    class Unwanted(ScriptedCore):
        def start(self) -> None:
            pytest.fail("the engine was started although the port is in use")

    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(StartupError, match="use") as caught:
        serve(core=Unwanted(), **{flag: taken.getsockname()[1]})
    assert f"--{flag.replace('_', '-')}" in str(caught.value)


@pytest.mark.parametrize(("address", "flag"), [("no.such.host.invalid", "host"), ("192.0.2.1", "admin-host")])
def test_an_address_that_is_not_this_machines(serve: Serve, say: Say, address: str, flag: str) -> None:
    with pytest.raises(StartupError, match=rf"cannot listen on {address}, port 0: .* another --{flag}$"):
        serve(say("ok"), **{flag.replace("-", "_"): address})


async def test_a_model_that_is_not_supported_is_refused_before_the_engine_starts(
    model_dir: Path, tmp_path: Path
) -> None:
    for file in model_dir.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "config.json").write_text('{"architectures": ["GemmaForCausalLM"]}')
    settings = ServerSettings(host="127.0.0.1", port=0, admin_port=0)
    with pytest.raises(StartupError, match="GemmaForCausalLM is not supported"):
        async with start_server(settings, EngineConfig(model=str(tmp_path)), spawn=lambda _: pytest.fail("started")):
            pass
