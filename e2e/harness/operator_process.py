"""A running `evenhand-operator`."""

import json
import os
import sys
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from prometheus_client.parser import text_string_to_metric_families

from cluster.control_plane import ControlPlane
from cluster.ports import free_ports

Object = dict[str, Any]

ANSWER_SECONDS = 60.0  # for what a machine that does nothing else answers in milliseconds


class OperatorProcess:
    """One replica, with the rights of `kubeconfig`. Entered, it runs; left, it is stopped as a kubelet would.

    `module` is the program: the operator, or one that is the operator but for something.
    """

    def __init__(
        self,
        cluster: ControlPlane,
        kubeconfig: Path,
        log: Path,
        namespaces: Sequence[str] = (),
        *options: str,
        module: str = "evenhand_operator",
    ) -> None:
        [self._port] = free_ports(1)
        command = [
            sys.executable,
            "-m",
            module,
            "--host=127.0.0.1",
            f"--metrics-port={self._port}",
            *(f"--namespace={each}" for each in namespaces),
            *options,
        ]
        own = {"KUBECONFIG": str(kubeconfig), "POD_NAME": log.stem, "PYTHONPATH": str(Path(__file__).parents[1])}
        self.log = log
        self.program = cluster.program(log.stem, command, log, os.environ | own)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self, wait: bool = True) -> None:
        """Returns when it has listed everything, unless it is not to wait."""
        self.program.start()
        if wait:
            self.program.wait_until_ready(self.is_ready)

    def stop(self) -> None:
        """SIGTERM."""
        self.program.stop(grace=60)

    def kill(self) -> None:
        """SIGKILL."""
        self.program.stop(grace=0)

    def is_ready(self) -> bool:
        """By its own probe."""
        return self.probe("readyz") == 200

    def probe(self, name: str) -> int:
        """Status of a probe; 0 while nobody listens."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self._port}/{name}", timeout=ANSWER_SECONDS) as response:
                return int(response.status)
        except urllib.error.HTTPError as error:
            return error.code
        except OSError:
            return 0

    def metric(self, name: str, **labels: str) -> float:
        """Sum of the samples of that name that have these labels."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self._port}/metrics", timeout=ANSWER_SECONDS) as response:
            text = response.read().decode()
        return sum(
            sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        )


def read_json(url: str) -> Object:
    """A document from a pod."""
    with urllib.request.urlopen(url, timeout=ANSWER_SECONDS) as response:
        document: Object = json.load(response)
    return document
