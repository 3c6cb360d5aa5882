"""The real server with the default model, for clients that are not ours and run unchanged: `make clients`.

These tests run in an environment of their own, without a line of ours, and ask a server that runs in the project's.
"""

import os
import re
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

SERVER = os.environ.get("EVENHAND")
MODEL = "smollm2"
START_SECONDS = 180.0

os.environ.update(  # none of them may ask anybody but the server
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    LITELLM_LOCAL_MODEL_COST_MAP="True",
    DO_NOT_TRACK="1",
    TOKENIZERS_PARALLELISM="false",
    OPENAI_API_KEY="none",
)


@dataclass
class Served:
    """A running server. `directory`: of its model, in Hugging Face's format and in float32."""

    url: str
    directory: Path

    @property
    def openai_url(self) -> str:
        return f"{self.url}/v1"


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    if SERVER is None:
        pytest.skip("needs the environment of clients: make clients")
    directory = tmp_path_factory.mktemp("float32")
    python = Path(SERVER).with_name("python")
    subprocess.run([python, Path(__file__).with_name("float_model.py"), directory], check=True, timeout=START_SECONDS)
    flags = ["--host", "127.0.0.1", "--port", "0", "--admin-port", "0", "--served-model-name", MODEL]
    command = [SERVER, "serve", str(directory), "--dtype", "float32", "--max-model-len", "2048", *flags]
    log = tmp_path_factory.mktemp("log") / "server.log"
    with log.open("w") as file, subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=file) as process:
        try:
            yield Served(_url(process, log), directory)
        finally:
            process.terminate()
            process.wait(START_SECONDS)
    assert process.returncode == 0 and " ERROR " not in log.read_text()


def _url(process: "subprocess.Popen[bytes]", log: Path) -> str:
    deadline = time.monotonic() + START_SECONDS
    while not (found := re.search(r"Evenhand serves .* at (http\S+)/v1", log.read_text())):
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.1)
    return found[1]
