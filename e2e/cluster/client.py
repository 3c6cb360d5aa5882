"""A cluster as its users see it: by kubectl, and a kubeconfig of an admin's."""

import json
import os
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

Object = dict[str, Any]


class KubectlError(Exception):
    """kubectl ended with another status than 0; the message is what it printed."""


class Cluster:
    """`programs` has kubectl, and kstatus where that is asked; `directory` is a home for what they write."""

    def __init__(self, programs: Mapping[str, Path], directory: Path, kubeconfig: Path) -> None:
        self.directory = directory
        self.kubeconfig = kubeconfig
        self._programs = programs

    def kubectl(
        self, *arguments: str, stdin: str | None = None, kubeconfig: Path | None = None, timeout: float = 180
    ) -> str:
        """What kubectl prints on standard output, run as admin unless a kubeconfig is given. Raises KubectlError."""
        environment = {
            "HOME": str(self.directory),  # so that nothing of the user's own configuration or cache counts
            "KUBECONFIG": str(kubeconfig or self.kubeconfig),
            "PATH": os.environ["PATH"],
        }
        done = subprocess.run(
            [self._programs["kubectl"], *arguments],
            input=stdin or "",
            env=environment,
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        if done.returncode:
            raise KubectlError(f"kubectl {' '.join(arguments)}: {done.stderr}{done.stdout}".rstrip())
        return done.stdout

    def apply(self, *objects: Object, kubeconfig: Path | None = None) -> None:
        """`kubectl apply` of objects. Raises KubectlError."""
        document = json.dumps({"apiVersion": "v1", "kind": "List", "items": objects})
        self.kubectl("apply", "-f", "-", stdin=document, kubeconfig=kubeconfig)

    def get(self, resource: str, name: str, namespace: str | None = None) -> Object:
        """One object. Raises KubectlError."""
        result: Object = json.loads(self.kubectl("get", resource, name, "-o", "json", *in_namespace(namespace)))
        return result

    def find(self, resource: str, namespace: str | None = None, selector: str = "") -> list[Object]:
        """Objects of one kind, in one namespace or in the default one. Raises KubectlError."""
        answer = self.kubectl("get", resource, "-o", "json", "--selector", selector, *in_namespace(namespace))
        items: list[Object] = json.loads(answer)["items"]
        return items

    def everything(self) -> set[str]:
        """Namespace, kind and name of all objects that can be listed and deleted, but for those that come and go by themselves,
        and for those of the cluster's own namespaces, which its controllers make when they come to it."""
        kinds = self.kubectl("api-resources", "--verbs=list,delete", "-o", "name").split()
        lasting = [kind for kind in kinds if kind.partition(".")[0] not in ("events", "leases", "controllerrevisions")]
        columns = "NAMESPACE:.metadata.namespace,KIND:.kind,NAME:.metadata.name"
        lines = self.kubectl(
            "get", ",".join(lasting), "-A", "--no-headers", "-o", f"custom-columns={columns}"
        ).splitlines()
        return {" ".join(line.split()) for line in lines if not line.startswith(("kube-", "default "))}

    def kstatus(self, objects: Iterable[Object]) -> list[Object]:
        """Kind, namespace, name, status and message of each object, as Flux would see it."""
        lines = "".join(json.dumps(each) + "\n" for each in objects)
        done = subprocess.run(
            [self._programs["kstatus"]], input=lines, capture_output=True, text=True, check=True, timeout=180
        )
        return [json.loads(line) for line in done.stdout.splitlines()]

    def service_account_token(
        self, namespace: str, name: str, audience: str | None = None, duration: str = "1h"
    ) -> str:
        """A token bound to the ServiceAccount (a TokenRequest), for the API server unless an audience is given."""
        audiences = ["--audience", audience] if audience else []
        return self.kubectl("create", "token", name, "-n", namespace, "--duration", duration, *audiences).strip()

    def create_namespace(self, name: str, **labels: str) -> None:
        """Returns once Pods can be made in it: the controllers have given it its default ServiceAccount."""
        self.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}})
        self._wait_for_service_account(name)

    def _wait_for_service_account(self, namespace: str) -> None:
        self.kubectl("wait", "--for=create", "serviceaccount/default", "-n", namespace, "--timeout=120s")


def in_namespace(namespace: str | None) -> list[str]:
    """kubectl's options for a namespace."""
    return ["-n", namespace] if namespace else []
