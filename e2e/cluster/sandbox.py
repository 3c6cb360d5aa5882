"""Sandbox: what the process of a Pod is given, and how its own command is made to fit this machine."""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Object = dict[str, Any]


@dataclass(frozen=True)
class Launch:
    """How to start the process that stands for a container; without `environment` it has that of the tests."""

    command: Sequence[str | Path]
    environment: Mapping[str, str] | None = None


@dataclass(frozen=True)
class Sandbox:
    """What the process of a Pod is given: the Pod, its address, and a folder of its own."""

    pod: Object
    address: str
    directory: Path

    @property
    def container(self) -> Object:
        """Spec of the container that runs."""
        first: Object = self.pod["spec"]["containers"][0]
        return first

    def volume(self, name: str) -> Path:
        """The folder that has what the Pod mounts as the volume of this name."""
        return self.directory / "volumes" / name

    def own_command(self) -> Launch:
        """The container's own command, arguments and environment, as a manifest has them, made to fit this machine.

        Mounted folders are those of the volumes, all addresses (0.0.0.0, ::) is the Pod's, programs come from the PATH.
        """
        spec = self.container
        environment = {each["name"]: self._here(each["value"]) for each in spec.get("env", []) if "value" in each}
        for each in spec.get("env", []):
            if (
                "valueFrom" in each
            ):  # of the fields of a Pod those that programs ask for: metadata.name, .namespace, .uid
                environment[each["name"]] = self.pod["metadata"][
                    each["valueFrom"]["fieldRef"]["fieldPath"].split(".")[1]
                ]
        command = [self._here(each) for each in (*spec.get("command", []), *spec.get("args", []))]
        return Launch(command, os.environ | environment)

    def _here(self, text: str) -> str:
        here = {"0.0.0.0": self.address, "::": self.address}
        here |= {each["mountPath"]: str(self.volume(each["name"])) for each in self.container.get("volumeMounts", [])}
        longest_first = "|".join(map(re.escape, sorted(here, key=len, reverse=True)))
        # all at once: what one replacement brings in, perhaps below /tmp, is not for the next
        return re.sub(rf"(?<![\w./-])({longest_first})(?![\w.-])", lambda match: here[match[1]], text)
