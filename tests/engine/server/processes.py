"""`evenhand serve` in processes of its own."""

import contextlib
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import psutil

from cluster.ports import free_ports

START_SECONDS = 600.0  # the first time, much is compiled; torch alone takes 5 s to import, and the machine may be busy
STOP_SECONDS = 120.0


@dataclass
class ServeProcess:
    """A running `evenhand serve`."""

    process: "subprocess.Popen[str]"
    url: str
    admin_url: str
    log: list[str]
    reader: threading.Thread

    def client(self, **options: Any) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=120, **options)

    @property
    def core(self) -> psutil.Process:
        """The engine core: the child that has torch in memory."""
        return max(psutil.Process(self.process.pid).children(recursive=True), key=lambda p: p.memory_info().rss)

    def wait(self) -> int:
        return self.process.wait(STOP_SECONDS)

    def whole_log(self) -> list[str]:
        """What it and the processes that it has started have said until the last of them was gone."""
        self.reader.join(STOP_SECONDS)
        assert not self.reader.is_alive(), "somebody lives"
        return self.log


Command = Callable[..., "subprocess.Popen[str]"]
Start = Callable[..., ServeProcess]


def free_port() -> int:
    """One that the kernel gives to nobody who connects meanwhile."""
    [port] = free_ports(1)
    return port


@contextlib.contextmanager
def running(*args: str) -> Iterator["subprocess.Popen[str]"]:
    command = [str(Path(sys.executable).with_name("evenhand")), "serve", *args]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        family = [psutil.Process(process.pid)]
        try:
            yield process
        finally:
            with contextlib.suppress(psutil.NoSuchProcess):
                family += family[0].children(recursive=True)
            for member in family:
                with contextlib.suppress(psutil.NoSuchProcess):
                    member.kill()


@contextlib.contextmanager
def serving(*args: str) -> Iterator[ServeProcess]:
    admin_port = free_port()
    with running("--host", "127.0.0.1", "--port", "0", "--admin-port", str(admin_port), *args) as process:
        log: list[str] = []
        found = threading.Event()

        def read() -> None:
            assert process.stderr is not None
            for line in process.stderr:
                log.append(line)
                if "Evenhand serves" in line:
                    found.set()
            found.set()

        reader = threading.Thread(target=read)
        reader.start()
        assert found.wait(START_SECONDS), log
        urls = [url for line in log if (url := re.search(r"at (http\S+)/v1", line))]
        assert urls, log
        yield ServeProcess(process, urls[0][1], f"http://127.0.0.1:{admin_port}", log, reader)
    reader.join(STOP_SECONDS)


@contextlib.contextmanager
def tiny_servers(model_dir: Path) -> Iterator[Start]:
    with contextlib.ExitStack() as stack:
        yield lambda *args: stack.enter_context(serving(str(model_dir), "--load-format", "dummy", *args))
