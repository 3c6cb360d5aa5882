"""Policies from a directory of YAML files: the objects that kubectl would apply, without a cluster.

A directory holds TenantPolicies, the Secrets that they name and at most one EnginePool. Files have no age, so whatever
two of them claim is an error naming both, and one error refuses the directory: the caller keeps its last good config.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, TypeVar

from evenhand_policy.compile import compile_policies
from evenhand_policy.config import SchedulerConfig
from evenhand_policy.decode import decode, reference_to
from evenhand_policy.documents import MAX_FILE_BYTES, Document, DocumentError, read_documents
from evenhand_policy.errors import InvalidResourceError, ResourceReference, reference
from evenhand_policy.identities import ObjectKey
from evenhand_policy.pool import EnginePool
from evenhand_policy.schema import Model
from evenhand_policy.secret import Secret
from evenhand_policy.spec import TenantPolicy

MAX_FILES = 10_000
_SUFFIXES = frozenset({".yaml", ".yml", ".json"})
_SHOWN_PROBLEMS = 20

_Resource = TypeVar("_Resource", bound=Model)


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
        self.policies: list[TenantPolicy] = []
        self.pools: list[EnginePool] = []
        self.secrets: dict[ObjectKey, Secret] = {}
        self._problems: list[FileProblem] = []
        self._places: dict[ResourceReference, tuple[str, Document]] = {}
        for name, content in self._read(directory):
            self._load_file(name, content)
        if len(self.pools) > 1:
            names = " and ".join(self._place(reference(pool)) for pool in self.pools[:2])
            self._report(reference(self.pools[1]), "kind", f"more than one EnginePool ({names}); keep one")

    def compile(self) -> SchedulerConfig:
        """The config of all policies.

        Raises:
            PolicyFileError: a file could not be read, or a policy not compiled.
        """
        if self._problems:
            raise PolicyFileError(self._problems)
        pool = self.pools[0] if self.pools else None
        config, problems = compile_policies(self.policies, pool, self.secrets)
        for problem in problems:
            also = f" (the other: {self._place(problem.claimant)})" if problem.claimant else ""
            where = f"{problem.path}: " if problem.path else ""
            self._report(problem.resource, problem.path, f"{where}{problem.message}{also} [{problem.reason}]")
        if self._problems:
            raise PolicyFileError(self._problems)
        return config

    def _report(self, resource: ResourceReference, path: str, message: str) -> None:
        file, document = self._places[resource]
        self._problems.append(FileProblem(file, document.line_of(path), message))

    def _place(self, resource: ResourceReference) -> str:
        file, document = self._places[resource]
        return f"{file}:{document.line_of('')}"

    def _read(self, directory: Path) -> Iterator[tuple[str, bytes]]:
        """Name and content of each file; what cannot be read becomes a problem."""
        try:
            paths = sorted(path for path in _snapshot(directory).iterdir() if _is_policy_file(path))
        except OSError as error:
            self._problems.append(FileProblem(str(directory), None, f"cannot be read: {_cause(error)}"))
            return
        if len(paths) > MAX_FILES:
            self._problems.append(FileProblem(str(directory), None, f"more than {MAX_FILES} files; split it"))
            return
        for path in paths:
            name = str(directory / path.name)
            try:
                with path.open("rb") as file:
                    yield name, file.read(MAX_FILE_BYTES + 1)
            except OSError as error:
                self._problems.append(FileProblem(name, None, f"cannot be read: {_cause(error)}"))

    def _load_file(self, name: str, content: bytes) -> None:
        try:
            documents = read_documents(content)
        except DocumentError as error:
            self._problems.append(FileProblem(name, error.line, error.message))
            return
        for index, document in enumerate(documents):
            try:
                self._load_document(name, index, document)
            except InvalidResourceError as error:
                problem = error.problem
                where = f"{problem.path}: " if problem.path else ""
                line = document.line_of(problem.path)
                self._problems.append(FileProblem(name, line, f"{where}{problem.message} [{problem.reason}]"))

    def _load_document(self, name: str, index: int, document: Document) -> None:
        value = document.value
        kind = value.get("kind") if isinstance(value, dict) else None
        match kind:
            case "TenantPolicy":
                self.policies.append(self._register(name, document, decode(value, TenantPolicy)))
            case "EnginePool":
                self.pools.append(self._register(name, document, decode(value, EnginePool)))
            case "Secret":
                secret = self._register(name, document, decode(value, Secret))
                self.secrets[secret.metadata.namespace, secret.metadata.name] = secret
            case _:
                shown = f"has kind {kind[:80]}" if isinstance(kind, str) else "has no kind"
                message = f"document {index + 1} {shown}; only TenantPolicy, Secret and EnginePool belong here"
                self._problems.append(FileProblem(name, document.line_of("kind"), message))

    def _register(self, name: str, document: Document, resource: _Resource) -> _Resource:
        key = reference_to(document.value, type(resource).__name__)
        if key in self._places:
            message = f"{key} is defined twice: here and at {self._place(key)}; keep one"
            self._problems.append(FileProblem(name, document.line_of("metadata.name"), message))
        else:
            self._places[key] = (name, document)
        return resource


def _snapshot(directory: Path) -> Path:
    """Where the files really are: a mounted ConfigMap or Secret is replaced as a whole by moving the link `..data`."""
    data = directory / "..data"
    return data.resolve(strict=True) if data.is_symlink() else directory


def _is_policy_file(path: Path) -> bool:
    return path.suffix in _SUFFIXES and not path.name.startswith(".") and path.is_file()


def _cause(error: OSError) -> str:
    return error.strerror or type(error).__name__
