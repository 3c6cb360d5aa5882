"""Makes the torch of a package index, which is built for CUDA, one for the CPU: `without_cuda.py SITE_PACKAGES`.

No index that we can name has the CPU's build, and the other weighs four gigabytes. Of what it cannot be imported without, CUDA's
libraries, every one is replaced by a small one with the same name and the functions that the rest of torch binds when it is loaded.
CUDA's answer 0, which means: it works, and there are no devices. So `torch.cuda.is_available()` is False. Needs binutils and gcc.
"""

import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

REPLACED = {"libtorch_cuda.so", "libtorch_cuda_linalg.so", "libtorch_nvshmem.so", "libcaffe2_nvrtc.so"}
"""Of torch's own libraries those that only CUDA needs: half of its weight."""

SYSTEM = re.compile(r"(lib(c|m|dl|rt|z|pthread|gcc_s|quadmath|stdc\+\+)|ld-linux-.*)\.so\.\d+")
"""Libraries of the operating system, which are there."""

CLASS = "_ZTVN10__cxxabiv117__class_type_infoE"
"""The C++ library's table of descriptions of classes."""

CHANGES = [
    # no communication between processes, which would set NCCL up when it is imported: torch asks for these names to see
    # what it was built with
    (
        "torch/__init__.py",
        "        _load_global_deps()\n    from torch._C import *  # noqa: F403\n",
        """
for _name in ("_c10d_init", "_rpc_init", "_dist_autograd_init", "_faulty_agent_init"):
    vars(sys.modules["torch._C"]).pop(_name, None)
""",
    ),
    # no other kernels in place of CUDA's, which are not there
    (
        "torch/_native/registry.py",
        "    for key, graph in _graphs.items():\n",
        """        if key[2] == "CUDA":
            continue
""",
    ),
]
"""File, lines that it has, lines that come after them."""


def main(site_packages: Path) -> None:
    """Replaces the libraries in place. Raises CalledProcessError where torch cannot be imported after that."""
    libraries = site_packages / "torch/lib"
    lost: set[str] = set()
    for path in (libraries / name for name in REPLACED):
        lost |= defined_symbols(path)
        path.unlink()
    kept = sorted(libraries.glob("*.so*"))
    wanted = undefined_symbols([*kept, *(site_packages / "torch").glob("_C*.so")])
    here = {path.name for path in kept}
    for name in sorted({name for path in kept for name in needed(path)} - here):
        if name in REPLACED:  # CUDA's own libraries have a version on their names, but for cuFile's; torch's on none
            build_stub(
                libraries / name, "", wanted[""] & lost | {each for each in wanted[""] if each.startswith("cuFile")}
            )
        elif not SYSTEM.fullmatch(name):
            build_stub(libraries / name, name, wanted[name])
    for name, after, lines in CHANGES:
        insert(site_packages / name, after, lines)
    check = (
        "import torch; assert not torch.cuda.is_available(); assert (torch.ones(4, 4) @ torch.ones(4, 4)).sum() == 64"
    )
    subprocess.run([sys.executable, "-c", check], check=True)


def insert(module: Path, after: str, lines: str) -> None:
    """Adds lines to a module of torch after others that it has once."""
    text = module.read_text()
    assert text.count(after) == 1, f"{module} is not as it was: {after!r}"
    module.unlink()  # it may be a link into a cache
    module.write_text(text.replace(after, after + lines))


def needed(library: Path) -> list[str]:
    """Names of the libraries that one asks for."""
    return re.findall(r"\(NEEDED\).*\[(.+)\]", output("readelf", "--dynamic", str(library)))


def defined_symbols(library: Path) -> set[str]:
    """Names that a library offers."""
    lines = output("nm", "--dynamic", "--defined-only", str(library)).splitlines()
    return {line.split()[-1].partition("@")[0] for line in lines}


def undefined_symbols(libraries: Iterable[Path]) -> defaultdict[str, set[str]]:
    """What libraries want of others: names by version, the empty one for those without."""
    wanted: defaultdict[str, set[str]] = defaultdict(set)
    for library in libraries:
        for line in output("nm", "--dynamic", "--undefined-only", str(library)).splitlines():
            name, _, version = line.split()[-1].partition("@")
            wanted[version].add(name)
    return wanted


def build_stub(path: Path, version: str, names: set[str]) -> None:
    """A library of one version that has these names."""
    lines = ["static long zeros[512];", f"extern char {CLASS}[];", *map(definition, sorted(names))]
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "stub.c").write_text("\n".join(lines))
        (Path(directory) / "versions").write_text(f"{version} {{ global: *; }};\n")
        command = ["gcc", "-shared", "-w", f"-Wl,-soname,{path.name}", f"-Wl,--version-script={directory}/versions"]
        subprocess.run([*command, f"{directory}/stub.c", "-l:libstdc++.so.6", "-o", str(path)], check=True)


def definition(name: str) -> str:
    """C of one name: a class's description, another table, or a function that returns 0 or, one of torch, a reference to it."""
    if name.startswith("_ZTI"):
        return f'void *{name}[] = {{{CLASS} + 16, "{name.removeprefix("_ZTI")}"}};'
    if name.startswith("_ZT"):
        return f"char {name}[4096];"
    return f"long {name}(void) {{ return {'(long)zeros' if name.startswith('_Z') else '0'}; }}"


def output(*command: str) -> str:
    """What a program prints."""
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


if __name__ == "__main__":
    main(Path(sys.argv[1]))
