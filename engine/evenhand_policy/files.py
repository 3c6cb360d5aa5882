"""Policies from a directory of YAML files: the objects that kubectl would apply, without a cluster.

A directory holds TenantPolicies, the Secrets that they name and at most one EnginePool. Files have no age, so whatever
two of them claim is an error naming both, and one error refuses the directory: the caller keeps its last good config.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from evenhand_policy.compile import compile_policies
from evenhand_policy.config import SchedulerConfig
from evenhand_policy.errors import reference
from evenhand_policy.resource_files import Finding, ResourceFiles
from evenhand_policy.yaml_reader import MAX_FILE_BYTES

MAX_FILES = 10_000
_SUFFIXES = frozenset({".yaml", ".yml", ".json"})
_SHOWN_PROBLEMS = 20


class FileProblem(NamedTuple):
    """What is wrong in one place. `line` is from 1; None: the file or directory as a whole."""

    path: str
    line: int | None
    message: str

    def __str__(self) -> str:
        where = self.path if self.line is None else f"{self.path}:{self.line}"
        return f"{where}: {self.message}"


class PolicyFileError(ValueError):
    """A directory of policies cannot be used. `problems` holds everything that was found, sorted by place."""

    def __init__(self, problems: list[FileProblem]) -> None:
        self.problems = tuple(sorted(problems, key=lambda problem: (problem.path, problem.line or 0, problem.message)))
        shown = [str(problem) for problem in self.problems[:_SHOWN_PROBLEMS]]
        hidden = len(self.problems) - len(shown)
        super().__init__("\n".join([*shown, f"and {hidden} more"] if hidden else shown))


def load_policy_directory(path: str | Path) -> SchedulerConfig:
    """Compile the `*.yaml`, `*.yml` and `*.json` files of a directory.

    Hidden files and sub-directories are left out, links are followed; of a mounted ConfigMap one consistent version is
    read. Files have no history: epoch and revision are 0, the digest tells two configs apart.

    Raises:
        PolicyFileError: with every problem that was found.
    """
    return PolicyDirectory(Path(path)).compile()


class PolicyDirectory:
    """The resources of a directory as it was when this was created, and where each of them stands."""

    def __init__(self, directory: Path) -> None:
        self._resources = ResourceFiles()
        for name, content in self._read(directory):
            self._resources.add(name, content)
        pools = self._resources.pools
        if len(pools) > 1:
            names = " and ".join(self._resources.place(reference(pool)) for pool in pools[:2])
            self._resources.report_at(reference(pools[1]), "", f"more than one EnginePool ({names}); keep one")

    def compile(self) -> SchedulerConfig:
        """The config of all policies.

        Raises:
            PolicyFileError: a file could not be read, or a policy not compiled.
        """
        resources = self._resources
        if not resources.findings:
            pool = resources.pools[0] if resources.pools else None
            config, problems = compile_policies(resources.policies, pool, resources.secrets)
            if not problems:
                return config
            for problem in problems:
                resources.report(problem)
        raise PolicyFileError([FileProblem(each.file, each.line, each.text) for each in resources.findings])

    def _read(self, directory: Path) -> Iterator[tuple[str, bytes]]:
        """Name and content of each file; what cannot be read becomes a problem."""
        findings = self._resources.findings
        try:
            paths = sorted(path for path in _snapshot(directory).iterdir() if is_policy_file(path))
        except OSError as error:
            findings.append(Finding(str(directory), None, f"cannot be read: {cause_of(error)}"))
            return
        if len(paths) > MAX_FILES:
            findings.append(Finding(str(directory), None, f"more than {MAX_FILES} files; split it"))
            return
        for path in paths:
            name = str(directory / path.name)
            try:
                yield name, read_bounded(path)
            except OSError as error:
                findings.append(Finding(name, None, f"cannot be read: {cause_of(error)}"))


def read_bounded(path: Path) -> bytes:
    """The file's content, no more of it than shows that it is too large. Raises OSError."""
    with path.open("rb") as file:
        return file.read(MAX_FILE_BYTES + 1)


def _snapshot(directory: Path) -> Path:
    """Where the files really are: a mounted ConfigMap or Secret is replaced as a whole by moving the link `..data`."""
    data = directory / "..data"
    return data.resolve(strict=True) if data.is_symlink() else directory


def is_policy_file(path: Path) -> bool:
    """Whether it is a file whose name says that it is YAML or JSON, and that is not hidden."""
    return path.suffix in _SUFFIXES and not path.name.startswith(".") and path.is_file()


def cause_of(error: OSError) -> str:
    """Why a file cannot be read, without its name."""
    return error.strerror or type(error).__name__
