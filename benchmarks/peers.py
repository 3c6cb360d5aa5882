"""llama.cpp's server beside ours, where it is installed: built from its source package, serving the default model's own file."""

import contextlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import serving

BINARY_VARIABLE, MODEL_VARIABLE = "EVENHAND_LLAMA_SERVER", "EVENHAND_LLAMA_MODEL"
LLAMA_CPP_RETRIES = 2
"""It closes a connection after a hundred requests, though the next one may be under way on it already."""

_COUNTS = re.compile(r"^llamacpp:(?:prompt_tokens_total|tokens_predicted_total) (\d+)", re.MULTILINE)


def num_tokens(metrics: str) -> int:
    """Prompt and output tokens that it has computed."""
    return sum(map(int, _COUNTS.findall(metrics)))


def find_llama_cpp() -> tuple[Path, Path] | None:
    """Its server's binary and a GGUF file; None where one is missing."""
    binary = os.environ.get(BINARY_VARIABLE) or shutil.which("llama-server")
    model = os.environ.get(MODEL_VARIABLE)
    return (
        (Path(binary), Path(model)) if binary and model and Path(binary).is_file() and Path(model).is_file() else None
    )


@contextlib.contextmanager
def llama_cpp(*flags: str, num_slots: int = 4, context: int = 16384) -> Iterator[serving.Server]:
    """A running llama.cpp server. Raises SystemExit that says what is missing."""
    if (found := find_llama_cpp()) is None:
        raise SystemExit(f"set {BINARY_VARIABLE} to llama.cpp's llama-server, and {MODEL_VARIABLE} to a GGUF file")
    binary, model = found
    port = serving.free_port()
    command = [str(binary), "-m", str(model), "--host", "127.0.0.1", "--port", str(port), "--metrics", *flags]
    command += ["--parallel", str(num_slots), "-c", str(context), "--no-kv-unified", "-t", str(os.cpu_count() or 1)]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True)
        try:
            serving.await_port(process, port, log, "/health")
            url = f"http://127.0.0.1:{port}"
            yield serving.Server(url, url, process.pid, LLAMA_CPP_RETRIES)
        finally:
            process.terminate()
            try:
                process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
