"""A real control plane: etcd, kube-apiserver and kube-controller-manager on free loopback ports.

TLS is verified by the cluster's own authority, RBAC is on, ServiceAccount tokens are real, and every run has its own
data. Mostly no node runs: Pods are kept by `cluster.pod_runner`, so the controllers that would declare them lost are left out.
`cluster.node` adds a real node.
"""

import json
import shutil
import ssl
import urllib.error
import urllib.request
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from cluster.api_client import ApiClient
from cluster.client import Cluster
from cluster.etcd import compact, write
from cluster.kubeconfig import CertificateAuthority, client_certificate, write_kubeconfig, write_signing_key
from cluster.ports import free_ports
from cluster.programs import Program, Running, Watchdog

ISSUER = "https://kubernetes.default.svc"
"""Issuer of the ServiceAccount tokens."""

LOOPBACK = "127.0.0.1"
SERVICE_ADDRESSES = "10.89.0.0/24"
API_SERVICE = "10.89.0.1"
"""The address of the Service `kubernetes`, the first of all."""


class ControlPlane(Cluster, Running):
    """Starts and stops the programs, and is the way to everything in them.

    `programs` tells where each program is; certificates, data and logs go below `directory`. `address` is one of this machine;
    where it is not of the loopback, real nodes may join, and reach the API server by it. `port` of the API server: None is any free one.
    """

    def __init__(
        self, programs: Mapping[str, Path], directory: Path, address: str = LOOPBACK, port: int | None = None
    ) -> None:
        super().__init__(programs, directory, kubeconfig=directory / "admin.kubeconfig")
        self.address = address
        etcd_port, peer_port, free_port, controller_port = free_ports(4)
        port = port or free_port
        self.server = f"https://{address}:{port}"
        self._etcd_url = f"http://{LOOPBACK}:{etcd_port}"
        self._watchdog = Watchdog()
        self._authority = CertificateAuthority(directory)
        self.authority = self._authority.certificate
        self.certificate_kubeconfig("admin", "system:masters")
        self._signing_key, self._trusted_keys = (
            directory / "service-account.key",
            directory / "service-account-keys.pem",
        )
        write_signing_key(self._signing_key, self._trusted_keys)
        self.etcd = self._etcd(peer_port)
        self.api_server = self._api_server(port)
        self.controller_manager = self._controller_manager(controller_port)
        self._tls = self._admin_context()

    def start(self) -> None:
        """Returns when the API server is ready and the controllers work. Raises ProgramDied, TimeoutError."""
        self.etcd.start()
        self.start_api_server()
        self.controller_manager.start()
        self._wait_for_service_account("default")

    def stop(self) -> None:
        """Ends everything, and removes etcd's data; logs stay."""
        self.controller_manager.stop()
        self.api_server.stop()  # before etcd: the other way round it takes a minute
        self.etcd.stop()
        self._watchdog.close()
        shutil.rmtree(self.directory / "etcd", ignore_errors=True)

    def start_api_server(self) -> None:
        """Starts the API server alone and waits until it is ready; etcd has kept the objects."""
        self.api_server.start()
        self.api_server.wait_until_ready(self._is_ready)

    def stop_api_server(self, grace: float = 2) -> None:
        """Stops the API server alone, `grace=0` as a crash would; etcd keeps the objects.

        It would wait longer for its clients to go, so it is mostly killed after `grace` seconds of refusing new ones.
        """
        self.api_server.stop(grace)

    def restart_api_server(self, grace: float = 2) -> None:
        """Stops and starts the API server alone: every watch is cut, and its watch cache starts empty."""
        self.stop_api_server(grace)
        self.start_api_server()

    def save_state(self) -> None:
        """Make a backup of etcd. It and the API server are restarted."""
        self._replace_data("etcd", "backup")

    def restore_state(self) -> None:
        """Go back to the backup; whatever has happened since did not."""
        self._replace_data("backup", "etcd")

    def _replace_data(self, source: str, target: str) -> None:
        self.stop_api_server(grace=0)
        self.etcd.stop()
        shutil.rmtree(self.directory / target, ignore_errors=True)
        shutil.copytree(self.directory / source, self.directory / target)
        self.etcd.start()
        self.start_api_server()

    def forget_history(self) -> None:
        """Restarts the API server on an etcd that has no earlier state any more: lists cannot be gone on with (410)."""
        self.stop_api_server(grace=0)
        compact(self._etcd_url)
        self.start_api_server()

    def pass_versions(self, count: int) -> None:
        """As many writes of somebody's: what is stored next has a version that is higher by so many."""
        for _ in range(count):
            write(self._etcd_url)

    def rotate_service_account_key(self) -> None:
        """Tokens are signed by another key from now on; those of earlier ones stay good. The API server is restarted."""
        write_signing_key(self._signing_key, self._trusted_keys)
        self.restart_api_server()

    def replace_authority(self) -> None:
        """The API server, which is restarted, shows a certificate of another authority from now on.

        Who had a kubeconfig from here has to be given another one; clients' certificates stay good.
        """
        self.controller_manager.stop()
        self.stop_api_server()
        replacement = CertificateAuthority(self.directory / "replacement")
        for issued in replacement.issue("kube-apiserver", *self._server_names()):
            issued.replace(self.directory / issued.name)
        self.authority = replacement.certificate
        self.certificate_kubeconfig("admin", "system:masters")
        self.certificate_kubeconfig("system:kube-controller-manager")
        self._tls = self._admin_context()
        self.start_api_server()
        self.controller_manager.start()

    def allows(
        self, user: str, verb: str, resource: str, namespace: str = "", subresource: str = "", *groups: str
    ) -> bool:
        """Whether a user may do something, by the API server's own judgement.

        `resource` is PLURAL.GROUP or PLURAL, with /NAME where one object is meant, or a path that begins with a slash.
        """
        what, _, name = resource.partition("/")
        plural, _, group = what.partition(".")
        found = {"group": group, "resource": plural, "subresource": subresource, "name": name, "namespace": namespace}
        about = (
            {"nonResourceAttributes": {"path": resource, "verb": verb}}
            if resource.startswith("/")
            else {"resourceAttributes": found | {"verb": verb}}
        )
        review = {
            "apiVersion": "authorization.k8s.io/v1",
            "kind": "SubjectAccessReview",
            "spec": {"user": user, "groups": ["system:authenticated", *groups], **about},
        }
        request = urllib.request.Request(
            f"{self.server}/apis/authorization.k8s.io/v1/subjectaccessreviews",
            json.dumps(review).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, context=self._tls, timeout=60) as response:
            return bool(json.load(response)["status"]["allowed"])

    def service_account_kubeconfig(self, namespace: str, name: str) -> Path:
        """A kubeconfig with which a program is that ServiceAccount, and may do what RBAC lets it do."""
        path = self.directory / f"{namespace}-{name}.kubeconfig"
        token = self.service_account_token(namespace, name)
        return write_kubeconfig(path, self.server, self.authority, {"token": token}, namespace)

    def api_client(self) -> ApiClient:
        """A client that is admin, for use within one event loop."""
        return ApiClient(self.server, self.authority, self.directory / "admin.crt", self.directory / "admin.key")

    def program(
        self, name: str, command: Sequence[str | Path], log: Path, environment: Mapping[str, str] | None = None
    ) -> Program:
        """A program, not started yet, that cannot outlive the test run."""
        return Program(name, command, log, self._watchdog, environment)

    def _wait_for_service_account(self, namespace: str) -> None:
        path = f"/api/v1/namespaces/{namespace}/serviceaccounts/default"
        self.controller_manager.wait_until_ready(lambda: self._answers(path))

    def _is_ready(self) -> bool:
        return self._answers("/readyz")

    def _answers(self, path: str) -> bool:
        try:
            with urllib.request.urlopen(self.server + path, context=self._tls, timeout=5) as response:
                return bool(response.status == 200)
        except (urllib.error.URLError, OSError):  # not listening yet, 404, 500
            return False

    def certificate_kubeconfig(self, user: str, group: str | None = None) -> Path:
        """A kubeconfig of a user who authenticates by certificate."""
        certificate, key = self._authority.issue(user, organization=group)
        path = certificate.with_suffix(".kubeconfig")
        return write_kubeconfig(path, self.server, self.authority, client_certificate(certificate, key))

    def _admin_context(self) -> ssl.SSLContext:
        context = ssl.create_default_context(cafile=self.authority)
        context.load_cert_chain(self.directory / "admin.crt", self.directory / "admin.key")
        return context

    def _server_names(self) -> Iterable[str]:
        return dict.fromkeys([self.address, LOOPBACK, API_SERVICE, "localhost", "kubernetes.default.svc"])

    def _program(self, name: str, *options: str) -> Program:
        return self.program(name, [self._programs[name], *options], self.directory / f"{name}.log")

    def _etcd(self, peer_port: int) -> Program:
        client, peer = self._etcd_url, f"http://{LOOPBACK}:{peer_port}"
        return self._program(
            "etcd",
            f"--data-dir={self.directory / 'etcd'}",
            "--unsafe-no-fsync",  # the data ends with the run
            f"--listen-client-urls={client}",
            f"--advertise-client-urls={client}",
            f"--listen-peer-urls={peer}",
            f"--initial-advertise-peer-urls={peer}",
            f"--initial-cluster=default={peer}",
        )

    def _api_server(self, port: int) -> Program:
        certificate, key = self._authority.issue("kube-apiserver", *self._server_names())
        if self.address == LOOPBACK:  # such an address may not be an endpoint
            of_nodes = ["--authorization-mode=RBAC", "--endpoint-reconciler-type=none"]
        else:
            admin = self.directory / "admin"
            of_nodes = [
                "--authorization-mode=Node,RBAC",
                "--kubelet-preferred-address-types=InternalIP",
                f"--kubelet-client-certificate={admin.with_suffix('.crt')}",
                f"--kubelet-client-key={admin.with_suffix('.key')}",
            ]
        return self._program(
            "kube-apiserver",
            f"--etcd-servers={self._etcd_url}",
            f"--bind-address={self.address}",
            f"--advertise-address={self.address}",
            f"--secure-port={port}",
            f"--tls-cert-file={certificate}",
            f"--tls-private-key-file={key}",
            f"--client-ca-file={self.authority}",
            "--allow-privileged",
            f"--service-account-issuer={ISSUER}",
            f"--service-account-signing-key-file={self._signing_key}",
            f"--service-account-key-file={self._trusted_keys}",
            f"--service-cluster-ip-range={SERVICE_ADDRESSES}",
            *of_nodes,
        )

    def _controller_manager(self, port: int) -> Program:
        kubeconfig = self.certificate_kubeconfig("system:kube-controller-manager")
        # without a kubelet's heartbeats the first would declare Pods lost, the second delete them
        left_out = ["node-lifecycle-controller", "pod-garbage-collector-controller"] if self.address == LOOPBACK else []
        return self._program(
            "kube-controller-manager",
            f"--kubeconfig={kubeconfig}",
            f"--authentication-kubeconfig={kubeconfig}",
            f"--authorization-kubeconfig={kubeconfig}",
            "--bind-address=127.0.0.1",
            f"--secure-port={port}",
            "--leader-elect=false",
            "--use-service-account-credentials",  # each controller with its own RBAC, as in a real cluster
            f"--service-account-private-key-file={self._signing_key}",
            f"--root-ca-file={self.authority}",
            f"--controllers={','.join(['*', *(f'-{each}' for each in left_out)])}",
        )
