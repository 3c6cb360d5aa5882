"""Builds the images of manifests/images/Dockerfile without a container daemon: Debian's buildah, on a base that is made of Debian's
packages and has the very name that the Dockerfile starts from, so that the Dockerfile itself is what is tested.

Images are named by a digest of what they are made from. Layers stay in a store in the user's cache: after a change of our own
code only the last ones are made anew. Run as a program (`make image-archives`) it builds what is missing; imported, it only tells.
"""

import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from cluster import build

REPOSITORY = build.SOURCES.parents[1]
DOCKERFILE = REPOSITORY / "manifests/images/Dockerfile"
BASE = "docker.io/library/python:3.13-slim"
SUITE = "trixie"
"""The Debian that has that Python."""

BASE_PACKAGES = "python3,python3-venv,ca-certificates"
PAUSE = "pause"
"""An image that does nothing: the node holds a Pod's namespaces with it."""

PAUSE_COMMAND = ("/usr/bin/sleep", "infinity")

TARGETS = ("operator", "engine", PAUSE)
CONTEXT = ("pyproject.toml", "README.md", "LICENSE", "operator", "engine", "cuda", "manifests/images")
NOT_WANTED = ("usr/share/doc", "usr/share/man", "usr/share/locale", "var/cache/apt", "var/lib/apt/lists", "var/log")
"""Folders of the base that an image for containers has empty."""

DEBIAN = {"buildah": "buildah", "debootstrap": "debootstrap"}
"""Programs of Debian that are needed, and the package of each."""

KEPT = 3
"""Generations of archives that are kept, for checkouts that take turns."""


def content_key() -> str:
    """Digest of everything that decides what the images are."""
    digest = hashlib.sha256(f"{BASE} {SUITE} {BASE_PACKAGES} {PAUSE_COMMAND}".encode())
    for name in CONTEXT:
        top = REPOSITORY / name
        for path in sorted([top] if top.is_file() else top.rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts:
                digest.update(f"\0{path.relative_to(REPOSITORY)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def archives() -> dict[str, Path]:
    """Where each image is, or will be once it is built: an OCI archive of `evenhand.dev/TARGET:dev`."""
    return {target: _archives() / content_key() / f"{target}.tar" for target in TARGETS}


def missing() -> list[str]:
    """Images that are still to be built."""
    return [target for target, path in archives().items() if not path.exists()]


def install(packages: Mapping[str, str]) -> None:
    """Installs packages of Debian whose program is not there yet. Raises CalledProcessError."""
    absent = sorted({package for program, package in packages.items() if not shutil.which(program)})
    if not absent:
        return
    build.say(f"installing Debian's {', '.join(absent)}")
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    for command in (["update", "-q"], ["install", "-q", "-y", "--no-install-recommends", *absent]):
        subprocess.run(["apt-get", *command], env=environment, stdin=subprocess.DEVNULL, stdout=sys.stderr, check=True)


def build_missing() -> None:
    """Builds what is missing; each archive appears whole or not at all. Raises CalledProcessError."""
    build.cache_folder().mkdir(parents=True, exist_ok=True)
    with open(build.cache_folder() / "images.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another checkout may be building the very same
        if missing():
            install(DEBIAN)
            _build_missing()


def _build_missing() -> None:
    # Containers of a build that was killed, whose images could not be removed: nobody else builds now.
    _buildah("rm", "--all")
    if not _output("images", "--quiet", "--filter", f"reference={BASE}"):
        _build_base()
    for target in missing():
        began = time.monotonic()
        name = f"evenhand.dev/{target}:dev"
        if target == PAUSE:
            _commit(_output("from", "--pull-never", BASE), name, *PAUSE_COMMAND)
        else:
            options = ["--pull-never", "--layers", "--quiet", *_options(), "--target", target, "--tag", name]
            _buildah("bud", *options, str(REPOSITORY))
        path = archives()[target]
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.unlink(missing_ok=True)
        _buildah("push", "--quiet", "--disable-compression", name, f"oci-archive:{partial}:{name}")
        partial.rename(path)
        build.say(f"built the image {target} in {time.monotonic() - began:.0f} s")
    for old in sorted(_archives().iterdir(), key=os.path.getmtime)[:-KEPT]:
        shutil.rmtree(old)
    _forget_other_layers()


def _forget_other_layers() -> None:
    """Removes layers of which nothing of the Dockerfile, as it is now, is made: without it the store grows with every lock file.

    Stages that others only copy from have no name and no descendant: they are given one, or the next build would make them anew.
    """
    for stage in stages():
        options = ["--pull-never", "--layers", "--quiet", *_options(), "--target", stage]
        _buildah("bud", *options, "--tag", f"evenhand.dev/stage/{stage}:dev", str(REPOSITORY))
    left = len(_output("images", "--all", "--quiet").split())
    while True:  # what was the base of a removed one is the next to go
        before = left
        _buildah("rmi", "--prune")
        left = len(_output("images", "--all", "--quiet").split())
        if left == before:
            break


def stages() -> list[str]:
    """Stages of the Dockerfile that the targets are made of, but for themselves."""
    text = DOCKERFILE.read_text().replace("\\\n", " ")
    _, *parts = re.split(r"^FROM (\S+) AS (\S+)$", text, flags=re.MULTILINE)
    sources = {
        name: {base, *re.findall(r"COPY --from=(\S+)", body)}
        for base, name, body in zip(parts[::3], parts[1::3], parts[2::3], strict=True)
    }
    needed: set[str] = set()
    wanted = {target for target in TARGETS if target in sources}
    while wanted := {source for name in wanted for source in sources[name] & sources.keys()} - needed:
        needed |= wanted
    return [name for name in sources if name in needed]


def _archives() -> Path:
    return build.cache_folder() / "images"


def _options() -> list[str]:
    ignored = f"{DOCKERFILE}.dockerignore"
    # this machine's authorities, since an index may be behind a company's own
    return ["--file", str(DOCKERFILE), "--ignorefile", ignored, "--volume", "/etc/ssl/certs:/etc/ssl/certs:ro"]


def _build_base() -> None:
    """As the image of that name is made: Debian's smallest system, Python, certificates, no documents."""
    build.say(f"building the base image of Debian's {SUITE}: 2 minutes")
    with tempfile.TemporaryDirectory(dir=build.cache_folder()) as directory:
        root = Path(directory, "root")
        command = ["debootstrap", "--variant=minbase", f"--include={BASE_PACKAGES}", SUITE, str(root)]
        subprocess.run(command, stdin=subprocess.DEVNULL, stdout=sys.stderr, check=True)
        for name in NOT_WANTED:
            for path in (root / name).iterdir():
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                else:
                    path.unlink()
        container = _output("from", "scratch")
        _buildah("add", "--quiet", container, str(root), "/")
        _commit(container, BASE, "python3")


def _commit(container: str, name: str, *command: str) -> None:
    _buildah("config", "--entrypoint", "[]", "--cmd", json.dumps(command), container)
    _buildah("commit", "--quiet", "--rm", container, name)


def _command(arguments: Sequence[str]) -> list[str]:
    store = build.cache_folder() / "image-store"
    return ["buildah", "--root", str(store), "--runroot", str(store / "run"), "--storage-driver", "overlay", *arguments]


def _environment() -> dict[str, str]:
    return os.environ | {"BUILDAH_ISOLATION": "chroot"}  # no user namespace and no runtime needed


def _buildah(*arguments: str) -> None:
    subprocess.run(_command(arguments), env=_environment(), stdin=subprocess.DEVNULL, stdout=sys.stderr, check=True)


def _output(*arguments: str) -> str:
    done = subprocess.run(
        _command(arguments), env=_environment(), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, check=True
    )
    return done.stdout.strip()


def main() -> int:
    """Builds; the exit status is 0 when everything is there."""
    if os.geteuid() or not shutil.which("apt-get"):
        build.say("images are built without Docker by root on Debian")
        return 1
    try:
        build_missing()
    except subprocess.CalledProcessError as failed:
        build.say(f"failed: {' '.join(map(str, failed.cmd))}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
