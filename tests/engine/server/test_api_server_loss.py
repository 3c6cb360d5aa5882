"""API servers that cannot start, or not anew."""

import os
import shutil
import signal
from pathlib import Path

import pytest

from evenhand_engine.config import EngineConfig
from evenhand_engine.errors import StartupError
from evenhand_engine.frontend.settings import ServerSettings
from evenhand_engine.server import api_servers
from evenhand_engine.server.startup import start_server

from .api_clients import api_pids
from .conftest import Serve
from .policies import until
from .scripted_core import ScriptedCore


def test_processes_that_keep_dying_end_the_server(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api_servers, "_RESTART_SECONDS", 0.0)
    monkeypatch.setattr(api_servers, "_MAX_DEATHS", 2)
    server = serve(api_server_count=2)
    for pid in api_pids():
        os.kill(pid, signal.SIGKILL)
    until(lambda: server.running.failure is not None, "they are given up")
    assert "died" in str(server.running.failure)


def test_one_that_cannot_be_started_anew_ends_the_server(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError("no more processes")

    monkeypatch.setattr(api_servers, "_RESTART_SECONDS", 0.0)
    server = serve(api_server_count=2)
    monkeypatch.setattr(api_servers.ApiServers, "_spawn", refuse)
    os.kill(min(api_pids()), signal.SIGKILL)
    until(lambda: server.running.failure is not None, "it is given up")
    assert "no more processes" in str(server.running.failure)


async def test_one_that_cannot_start_says_why(model_dir: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(model_dir, tmp_path / "model")
    (broken / "tokenizer.json").write_text("no tokenizer")
    settings = ServerSettings(host="127.0.0.1", port=0, admin_port=0, api_server_count=2)
    with pytest.raises(StartupError, match="tokenizer"):
        async with start_server(settings, EngineConfig(model=str(broken)), spawn=ScriptedCore().spawn):
            pass


def test_a_port_in_use_is_found_although_processes_share_one(serve: Serve) -> None:
    server = serve(api_server_count=2)
    port = int(server.url.rpartition(":")[2])
    with pytest.raises(StartupError, match=f"port {port}"):
        serve(api_server_count=2, port=port)
