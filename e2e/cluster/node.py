"""A real node beside a control plane: scheduler, containerd, kubelet, kube-proxy, CoreDNS, and kube-router for NetworkPolicies.

It wants namespaces of its own for network, mounts and processes, which `unshare` of util-linux makes (`make e2e-node`): then its
addresses lead nowhere else, and whatever ends the run, the kernel ends every container, mount and bridge with it.
"""

import contextlib
import json
import os
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from cluster.control_plane import SERVICE_ADDRESSES, ControlPlane
from cluster.programs import Program, Running

NAME = "node"
ADDRESS = "10.88.255.1"
"""Of the node, on a bridge that leads nowhere: it may not be of the loopback."""

API_PORT = 6443
"""Of the API server: where policies for Pods expect it."""

DNS_ADDRESS = "169.254.20.10"
"""As NodeLocal DNSCache has it, which is also of the node and of no Pod."""

POD_ADDRESSES = "10.88.0.0/24"
PAUSE = "evenhand.dev/pause:dev"

CGROUPS = Path("/sys/fs/cgroup")
KUBELET = Path("/var/lib/kubelet")
DEVICE_PLUGINS = KUBELET / "device-plugins"
"""Where a kubelet is told of devices, wherever its own root is."""

Object = dict[str, Any]


def isolation() -> str:
    """Why a node may not change this process's network, or nothing: the network leads nowhere."""
    links = json.loads(subprocess.run(["ip", "-json", "link"], capture_output=True, check=True, text=True).stdout)
    return (
        ""
        if [link["ifname"] for link in links] == ["lo"]
        else "a node needs namespaces of its own (make test, make e2e-node)"
    )


class Node(Running):
    """Starts and stops the programs of a node. `archives` are images that its containers may have."""

    def __init__(self, cluster: ControlPlane, programs: Mapping[str, Path], archives: Mapping[str, Path]) -> None:
        self._cluster = cluster
        self._programs = programs
        self._archives = archives
        self._directory = cluster.directory / "node"
        self._directory.mkdir()
        self._socket = self._directory / "containerd.sock"
        self._containerd = self._program("containerd", "--config", self._containerd_config())
        self._started: list[Program] = [self._containerd]

    def start(self) -> None:
        KUBELET.mkdir(exist_ok=True)
        subprocess.run(
            ["mount", "-t", "tmpfs", "tmpfs", str(KUBELET)], check=True
        )  # not shared with another node's run
        self._containerd.start()
        self._containerd.wait_until_ready(lambda: self._ctr("version").returncode == 0)
        for name, archive in self._archives.items():
            done = self._ctr("images", "import", "--local", str(archive))
            assert done.returncode == 0, f"{name}: {done.stderr}"
        for program in (self._scheduler(), self._kubelet(), self._kube_proxy(), self._coredns()):
            self._start(program)
        kubectl = self._cluster.kubectl
        kubectl("wait", "--for=create", f"node/{NAME}", "--timeout=180s", timeout=200)
        self._start(self._network_policies())  # which wants to find the node
        kubectl("wait", "--for=condition=Ready", f"node/{NAME}", "--timeout=180s", timeout=200)
        for program in self._started:
            program.check_running()

    def offer(self, resource: str, count: int) -> None:
        """From now on the node has so many devices of a kind, none of which is there."""
        self._start(self._program("device-plugin", DEVICE_PLUGINS, resource, str(count)))
        allocatable = f"jsonpath={{.status.allocatable.{resource.replace('.', chr(92) + '.')}}}={count}"
        self._cluster.kubectl("wait", f"node/{NAME}", f"--for={allocatable}", "--timeout=180s", timeout=200)

    def stop(self) -> None:
        """Ends containers, then programs, the runtime last, and takes back what the kubelet mounted and its control groups."""
        for program in reversed(self._started[1:]):
            program.stop()
        if self._containerd.exit_code() is None:
            for task in self._ctr("tasks", "list", "--quiet").stdout.split():
                self._ctr("tasks", "kill", "--signal", "SIGKILL", task)
        self._containerd.stop()
        self._unmount()
        self._remove_control_groups()

    def _start(self, program: Program) -> None:
        self._started.append(program)
        program.start()

    def _ctr(self, *arguments: str) -> "subprocess.CompletedProcess[str]":
        command = [str(self._programs["ctr"]), "--address", str(self._socket), "--namespace", "k8s.io", *arguments]
        return subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=300)

    def _unmount(self) -> None:
        mounts = [Path(line.split()[1]) for line in Path("/proc/self/mounts").read_text().splitlines()]
        for mount in reversed([mount for mount in mounts if mount.is_relative_to(self._directory) or mount == KUBELET]):
            subprocess.run(["umount", "--lazy", str(mount)], check=True)

    def _remove_control_groups(self) -> None:
        deadline = time.monotonic() + 10
        for top in [CGROUPS / "kubepods", *CGROUPS.glob("*/kubepods")]:
            for group in [*sorted(top.rglob("*/"), reverse=True), top]:
                while group.is_dir() and time.monotonic() < deadline:
                    with contextlib.suppress(OSError):  # busy until the kernel has reaped what was killed
                        group.rmdir()
                        break
                    time.sleep(0.05)

    def _program(self, name: str, *options: str | Path) -> Program:
        path = os.pathsep.join([str(self._programs[name].parent), os.environ["PATH"]])
        environment = os.environ | {"PATH": path}
        log = self._cluster.directory / f"{name}.log"
        return self._cluster.program(name, [self._programs[name], *options], log, environment)

    def _write(self, name: str, document: Object) -> Path:
        path = self._directory / name
        path.write_text(yaml.safe_dump(document))
        return path

    def _containerd_config(self) -> Path:
        networks = self._directory / "cni"
        networks.mkdir()
        ranges = [[{"subnet": POD_ADDRESSES}]]
        ipam = {
            "type": "host-local",
            "dataDir": str(self._directory / "ipam"),
            "ranges": ranges,
            "routes": [{"dst": "0.0.0.0/0"}],
        }
        bridge = {"type": "bridge", "bridge": "evh-pods", "isGateway": True, "hairpinMode": True, "ipam": ipam}
        ports = {"type": "portmap", "capabilities": {"portMappings": True}}
        configuration = {"cniVersion": "1.0.0", "name": "evenhand", "plugins": [bridge, ports]}
        (networks / "10-bridge.conflist").write_text(json.dumps(configuration))
        path = self._directory / "containerd.toml"
        path.write_text(f"""version = 3
root = "{self._directory}/containerd"
state = "{self._directory}/state"
[grpc]
  address = "{self._socket}"
[plugins.'io.containerd.cri.v1.images'.pinned_images]
  sandbox = "{PAUSE}"
[plugins.'io.containerd.cri.v1.runtime']
  restrict_oom_score_adj = true # some machines may not lower a score
  [plugins.'io.containerd.cri.v1.runtime'.cni]
    bin_dirs = ["/usr/lib/cni"]
    conf_dir = "{networks}"
""")
        return path

    def _scheduler(self) -> Program:
        kubeconfig = self._cluster.certificate_kubeconfig("system:kube-scheduler")
        return self._program(
            "kube-scheduler",
            f"--kubeconfig={kubeconfig}",
            f"--authentication-kubeconfig={kubeconfig}",
            f"--authorization-kubeconfig={kubeconfig}",
            "--bind-address=127.0.0.1",
            "--leader-elect=false",
        )

    def _kubelet(self) -> Program:
        kubeconfig = self._cluster.certificate_kubeconfig(f"system:node:{NAME}", "system:nodes")
        configuration = {
            "apiVersion": "kubelet.config.k8s.io/v1beta1",
            "kind": "KubeletConfiguration",
            "authentication": {"anonymous": {"enabled": False}, "x509": {"clientCAFile": str(self._cluster.authority)}},
            "authorization": {"mode": "AlwaysAllow"},
            "address": ADDRESS,
            "readOnlyPort": 0,
            "cgroupDriver": "cgroupfs",
            "failCgroupV1": False,
            "failSwapOn": False,
            "enforceNodeAllocatable": [],
            "evictionHard": {},
            "localStorageCapacityIsolation": True,
            "containerRuntimeEndpoint": f"unix://{self._socket}",
            "clusterDNS": [DNS_ADDRESS],
            "clusterDomain": "cluster.local",
            "resolvConf": "",
            "syncFrequency": "5s",  # how soon a changed Secret is in a volume
        }
        return self._program(
            "kubelet",
            f"--config={self._write('kubelet.yaml', configuration)}",
            f"--kubeconfig={kubeconfig}",
            f"--root-dir={self._directory / 'kubelet'}",
            f"--cert-dir={self._directory / 'pki'}",
            f"--hostname-override={NAME}",
            f"--node-ip={ADDRESS}",
        )

    def _kube_proxy(self) -> Program:
        configuration = {
            "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
            "kind": "KubeProxyConfiguration",
            "clientConnection": {"kubeconfig": str(self._cluster.certificate_kubeconfig("system:kube-proxy"))},
            "mode": "nftables",
            "bindAddress": "127.0.0.1",
            "hostnameOverride": NAME,
            "clusterCIDR": POD_ADDRESSES,
            "conntrack": {"maxPerCore": 0},
            "nodePortAddresses": ["127.0.0.0/8"],
        }
        return self._program("kube-proxy", f"--config={self._write('kube-proxy.yaml', configuration)}")

    def _coredns(self) -> Program:
        kubeconfig = self._reader(
            "coredns", {"": ["services", "pods", "namespaces"], "discovery.k8s.io": ["endpointslices"]}
        )
        path = self._directory / "Corefile"
        path.write_text(
            f"cluster.local {{\n  errors\n  kubernetes cluster.local {{\n    kubeconfig {kubeconfig}\n  }}\n}}\n"
        )
        return self._program("coredns", "-conf", path)

    def _network_policies(self) -> Program:
        """Only that of kube-router: kube-proxy has the Services, and there is one node to route to."""
        resources = {
            "": ["nodes", "services", "pods", "namespaces", "endpoints"],
            "networking.k8s.io": ["networkpolicies"],
            "discovery.k8s.io": ["endpointslices"],
        }
        return self._program(
            "kube-router",
            f"--kubeconfig={self._reader('kube-router', resources)}",
            f"--hostname-override={NAME}",
            f"--service-cluster-ip-range={SERVICE_ADDRESSES}",
            "--run-firewall=true",
            "--run-router=false",
            "--run-service-proxy=false",
            "--run-loadbalancer=false",
            "--health-port=0",
            "--metrics-port=0",
        )

    def _reader(self, name: str, resources: Mapping[str, list[str]]) -> Path:
        """kubeconfig of a user who may read these, by their API group, and nothing else."""
        rules = [
            {"apiGroups": [group], "resources": kinds, "verbs": ["get", "list", "watch"]}
            for group, kinds in resources.items()
        ]
        group = "rbac.authorization.k8s.io"
        common = {"apiVersion": f"{group}/v1", "metadata": {"name": name}}
        reference = {"apiGroup": group, "kind": "ClusterRole", "name": name}
        subject = {"apiGroup": group, "kind": "User", "name": name}
        self._cluster.apply(
            {**common, "kind": "ClusterRole", "rules": rules},
            {**common, "kind": "ClusterRoleBinding", "roleRef": reference, "subjects": [subject]},
        )
        return self._cluster.certificate_kubeconfig(name)


def prepare_network() -> None:
    """The node's addresses, and no way out for what is sent to a Service. Call it in a network namespace of its own."""
    for command in (
        "link set lo up",
        "link add evh-node type bridge",
        f"address add {ADDRESS}/32 dev evh-node",
        f"address add {DNS_ADDRESS}/32 dev evh-node",
        "link set evh-node up",
        f"route add {SERVICE_ADDRESSES} dev evh-node",
    ):
        subprocess.run(["ip", *command.split()], check=True)
    Path("/proc/sys/net/ipv4/ip_forward").write_text("1")
    Path("/proc/sys/net/bridge/bridge-nf-call-iptables").write_text("1")  # between Pods too policies are enforced
