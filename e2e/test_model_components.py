"""How engines come by their model in a cluster: the very command of the component, against a mirror of the hub."""

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from harness.kustomize import MANIFESTS

COMPONENT = MANIFESTS / "components/model-claim/fetch.yaml"
MODEL, TOKEN = "example/tiny", "a-token-that-nobody-may-see"
FILES = {"config.json": b"{}", "model.safetensors": b"weights", "pytorch_model.bin": b"the same, again"}


class Mirror:
    """The part of a hub's interface that fetching needs, on a port of the loopback."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.tokens: set[str | None] = set()
        self.fails = False
        mirror = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                mirror.answer(self)

            def do_HEAD(self) -> None:
                mirror.answer(self)

            def log_message(self, *_: object) -> None:
                """No access log."""

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> "Mirror":
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def answer(self, request: http.server.BaseHTTPRequestHandler) -> None:
        """One request: what the repository holds, or one of its files."""
        path = request.path.partition("?")[0]
        self.asked.append(path)
        if MODEL in path:
            self.tokens.add(request.headers["Authorization"])
        name = path.rpartition("/")[2]
        if path.startswith(f"/api/models/{MODEL}/tree/"):
            rows = [{"type": "file", "path": each, "size": len(FILES[each]), "oid": "0" * 40} for each in FILES]
            self._send(request, json.dumps(rows).encode())
        elif path.startswith(f"/api/models/{MODEL}"):
            listing = {"id": MODEL, "sha": "0" * 40, "siblings": [{"rfilename": each} for each in FILES]}
            self._send(request, json.dumps(listing).encode())
        elif path.startswith(f"/{MODEL}/resolve/") and name in FILES and not (self.fails and name.startswith("model")):
            self._send(request, FILES[name])
        else:
            request.send_error(500 if self.fails else 404)

    def _send(self, request: http.server.BaseHTTPRequestHandler, body: bytes) -> None:
        request.send_response(200)
        request.send_header("Content-Length", str(len(body)))
        request.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
        request.send_header("X-Repo-Commit", "0" * 40)
        request.end_headers()
        if request.command == "GET":
            request.wfile.write(body)


@pytest.fixture
def mirror() -> Iterator[Mirror]:
    with Mirror() as running:
        yield running


def fetch(mirror: Mirror, volume: Path, home: Path) -> subprocess.CompletedProcess[str]:
    """Runs the component's command, with its volume in another place."""
    spec = yaml.safe_load(COMPONENT.read_text())["spec"]["template"]["spec"]
    [container] = spec["initContainers"]
    names = {each["name"] for each in container["env"]}
    assert names == {"MODEL", "HOME", "HF_ENDPOINT", "HF_TOKEN"}
    environment = {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "MODEL": MODEL,
        "HOME": str(home),
        "HF_ENDPOINT": mirror.address,
        "HF_TOKEN": TOKEN,
    }
    [script] = container["args"]
    command = [*container["command"], script.replace("/models", str(volume))]
    return subprocess.run(command, env=environment, capture_output=True, text=True, input="", timeout=280)


def test_model_is_fetched_from_the_mirror_once(mirror: Mirror, tmp_path: Path) -> None:
    volume = tmp_path / "volume"
    volume.mkdir()
    done = fetch(mirror, volume, tmp_path)
    assert done.returncode == 0, done.stderr
    assert (volume / "model.safetensors").read_bytes() == FILES["model.safetensors"]
    assert (volume / "config.json").exists() and (volume / ".fetched").exists()
    assert not (volume / "pytorch_model.bin").exists(), "no second copy of the weights"
    assert mirror.tokens == {f"Bearer {TOKEN}"}
    assert TOKEN not in done.stdout + done.stderr
    before = len(mirror.asked)
    assert fetch(mirror, volume, tmp_path).returncode == 0
    assert len(mirror.asked) == before, "without a network too, from now on"


def test_engine_that_fetches_its_model_says_so(mirror: Mirror, tmp_path: Path) -> None:
    program = (
        "import logging; logging.basicConfig(level='INFO', format='%(message)s')\n"
        "from evenhand_engine.model import progress\n"
        "progress._SECONDS_BETWEEN = 0.0\n"
        "from evenhand_engine.model.source import resolve_model_dir\n"
        f"print(resolve_model_dir({MODEL!r}))"
    )
    environment = {"PATH": os.environ["PATH"], "HF_HOME": str(tmp_path), "HF_ENDPOINT": mirror.address}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    assert {f"fetching {MODEL}", f"fetching {MODEL}: 100 %"} <= set(done.stderr.splitlines())
    assert (Path(done.stdout.strip()) / "model.safetensors").read_bytes() == FILES["model.safetensors"]


def test_what_was_cut_short_is_no_model_and_is_gone_on_with(mirror: Mirror, tmp_path: Path) -> None:
    volume = tmp_path / "volume"
    volume.mkdir()
    mirror.fails = True
    assert fetch(mirror, volume, tmp_path).returncode != 0
    assert not (volume / ".fetched").exists()
    mirror.fails = False
    assert fetch(mirror, volume, tmp_path).returncode == 0
    assert (volume / "model.safetensors").exists()
