"""Builds what a node needs, once, into a folder of the user's cache: its programs, and the images that its Pods run.

Run as a program (`make node`) it builds what is missing, after installing the Debian packages that it needs; imported, it
only tells what is there. Needs root, Debian and Go; nothing of it needs a container daemon.
"""

import argparse
import fcntl
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from cluster import build, images
from cluster.isolated import forbidden

SOURCES = build.SOURCES
CONTAINERD = "github.com/containerd/containerd/v2/cmd"

# program: folder of its Go module, package in it
PROGRAMS = {
    "kube-scheduler": (SOURCES / "node", "k8s.io/kubernetes/cmd/kube-scheduler"),
    "kube-proxy": (SOURCES / "node", "k8s.io/kubernetes/cmd/kube-proxy"),
    "kubelet": (SOURCES / "node", "k8s.io/kubernetes/cmd/kubelet"),
    "containerd": (SOURCES / "containerd", f"{CONTAINERD}/containerd"),
    "containerd-shim-runc-v2": (SOURCES / "containerd", f"{CONTAINERD}/containerd-shim-runc-v2"),
    "ctr": (SOURCES / "containerd", f"{CONTAINERD}/ctr"),
    "coredns": (SOURCES / "coredns", "."),
    "device-plugin": (SOURCES / "device_plugin", "."),
    "kube-router": (SOURCES / "network_policies", "github.com/cloudnativelabs/kube-router/v2/cmd/kube-router"),
}

WITH_C = {"kubelet"}
"""Programs that are complete only if a C compiler takes part."""

DEBIAN = {
    "runc": "runc",
    "nft": "nftables",
    "iptables": "iptables",
    "ip": "iproute2",
    "ipset": "ipset",
    "conntrack": "conntrack",
    "/usr/lib/cni/bridge": "containernetworking-plugins",
}
"""Programs of Debian that are needed, and the package of each."""


def programs() -> dict[str, Path]:
    """Where each program is, or will be once it is built."""
    return {
        name: build.cache_folder() / f"node-{build.content_key(module)}" / name
        for name, (module, _) in PROGRAMS.items()
    }


def missing() -> str:
    """Why no node can run here, or nothing."""
    if reason := forbidden():
        return reason
    if packages := missing_packages():
        return f"Debian's {', '.join(packages)} not installed (make node)"
    if absent := [name for name, path in programs().items() if not os.access(path, os.X_OK)]:
        return f"{', '.join(absent)} not built (make node)"
    if absent := images.missing():
        return f"images {', '.join(absent)} not built (make node)"
    return ""


def missing_packages() -> list[str]:
    """Debian packages that are still to be installed."""
    return sorted({package for program, package in DEBIAN.items() if not shutil.which(program)})


def build_missing() -> None:
    """Installs packages and builds programs and images, what is missing of them; each program appears whole or not at all.

    Raises build.GoMissing; CalledProcessError where a build fails, after it has said why on standard error.
    """
    build.cache_folder().mkdir(parents=True, exist_ok=True)
    with open(build.cache_folder() / "node.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another checkout may be building the very same
        images.install(DEBIAN)
        absent = [name for name, path in programs().items() if not os.access(path, os.X_OK)]
        if absent:
            environment = build.go_environment()
            build.say(f"building {', '.join(absent)}: about 10 minutes on 2 cores the first time")
        for name in absent:
            destination = programs()[name]
            destination.parent.mkdir(exist_ok=True)
            with tempfile.TemporaryDirectory(dir=destination.parent) as scratch:
                cgo = {"CGO_ENABLED": "1"} if name in WITH_C else {}
                build.build(*PROGRAMS[name], Path(scratch, name), environment | cgo)
                os.replace(Path(scratch, name), destination)
        images.build_missing()


def main() -> int:
    """Builds; the exit status is 0 when everything is there."""
    parser = argparse.ArgumentParser(description=build_missing.__doc__)
    parser.add_argument("--if-possible", action="store_true", help="exit with 0 where not everything can be had")
    arguments = parser.parse_args()
    try:
        if reason := forbidden() or ("" if shutil.which("apt-get") else "a node needs Debian's packages"):
            build.say(reason)
        else:
            build_missing()
            return 0
    except build.GoMissing as reason:
        build.say(str(reason))
    except subprocess.CalledProcessError as failed:
        build.say(f"failed: {' '.join(map(str, failed.cmd))}")
    build.say("tests that need a node will be skipped")
    return 0 if arguments.if_possible else 1


if __name__ == "__main__":
    sys.exit(main())
