"""Resources of YAML files, each with its place: what a directory of policies and `evenhand lint` have in common."""

from typing import Any, NamedTuple, TypeVar

from evenhand_policy.decode import decode, reference_to
from evenhand_policy.errors import InvalidResourceError, PolicyProblem, Reason, ResourceReference
from evenhand_policy.identities import ObjectKey
from evenhand_policy.pool import EnginePool
from evenhand_policy.schema import Model
from evenhand_policy.secret import Secret
from evenhand_policy.spec import TenantPolicy
from evenhand_policy.yaml_reader import Entry, YamlError, read_entries

_Resource = TypeVar("_Resource", bound=Model)


class Finding(NamedTuple):
    """What is wrong in one place.

    Attributes:
        file: as the caller named it.
        line: from 1; None: the file as a whole.
        message: what is wrong and what to do. Never holds a credential.
        field: path of the field at fault; empty for an entry or file as a whole.
        reason: why the operator would refuse it; None where it is no resource at all.
        resource: None where it is not known.
    """

    file: str
    line: int | None
    message: str
    field: str = ""
    reason: Reason | None = None
    resource: ResourceReference | None = None

    @property
    def text(self) -> str:
        """Field, message and reason in one line."""
        where = f"{self.field}: " if self.field else ""
        why = f" [{self.reason}]" if self.reason else ""
        return f"{where}{self.message}{why}"


class ResourceFiles:
    """Policies, pools and Secrets of the files that were added, and what is wrong with these."""

    def __init__(self) -> None:
        self.policies: list[TenantPolicy] = []
        self.pools: list[EnginePool] = []
        self.secrets: dict[ObjectKey, Secret] = {}
        self.findings: list[Finding] = []
        self._places: dict[ResourceReference, tuple[str, Entry]] = {}

    def add(self, file: str, content: bytes) -> None:
        """The entries of one file."""
        try:
            entries = read_entries(content)
        except YamlError as error:
            self.reject(file, content, error)
            return
        for index, entry in enumerate(entries):
            self.add_entry(file, index, entry)

    def reject(self, file: str, content: bytes, error: YamlError) -> None:
        """A file that cannot be read as YAML."""
        self.findings.append(Finding(file, error.line, error.message))

    def add_entry(self, file: str, index: int, entry: Entry) -> None:
        """One entry, the `index`th of its file from 0."""
        try:
            self._decode(file, index, entry)
        except InvalidResourceError as error:
            problem = error.problem
            line = entry.line_of(problem.path)
            self.findings.append(Finding(file, line, problem.message, problem.path, problem.reason, problem.resource))

    def _decode(self, file: str, index: int, entry: Entry) -> None:
        value = entry.value
        kind = value.get("kind") if isinstance(value, dict) else None
        match kind:
            case "TenantPolicy":
                self.policies.append(self._register(file, entry, decode(value, TenantPolicy)))
            case "EnginePool":
                self.pools.append(self._register(file, entry, decode(value, EnginePool)))
            case "Secret":
                secret = self._register(file, entry, decode(value, Secret))
                self.secrets[secret.metadata.namespace, secret.metadata.name] = secret
            case _:
                self.add_foreign(file, index, entry, kind)

    def add_foreign(self, file: str, index: int, entry: Entry, kind: Any) -> None:
        """An entry that is none of a pool's."""
        shown = f"has kind {kind[:80]}" if isinstance(kind, str) else "has no kind"
        message = f"entry {index + 1} {shown}; only TenantPolicy, Secret and EnginePool belong here"
        self.findings.append(Finding(file, entry.line_of("kind"), message))

    def report(self, problem: PolicyProblem) -> None:
        """What came of compiling a resource that was added, and where the one stands that it conflicts with."""
        also = f" (the other: {self.place(problem.claimant)})" if problem.claimant in self._places else ""
        self.report_at(problem.resource, problem.path, f"{problem.message}{also}", problem.reason)

    def report_at(self, resource: ResourceReference, path: str, message: str, reason: Reason | None = None) -> None:
        """Something about a field of a resource that was added."""
        self.findings.append(self.found_at(resource, path, message, reason))

    def found_at(self, resource: ResourceReference, path: str, message: str, reason: Reason | None = None) -> Finding:
        """The same, for the caller to keep."""
        file, entry = self._places[resource]
        return Finding(file, entry.line_of(path), message, path, reason, resource)

    def place(self, resource: ResourceReference) -> str:
        """File and line of a resource that was added."""
        file, entry = self._places[resource]
        return f"{file}:{entry.line_of('')}"

    def _register(self, file: str, entry: Entry, resource: _Resource) -> _Resource:
        key = reference_to(entry.value, type(resource).__name__)
        if key in self._places:
            message = f"{key} is defined twice: here and at {self.place(key)}; keep one"
            self.findings.append(Finding(file, entry.line_of("metadata.name"), message, resource=key))
        else:
            self._places[key] = (file, entry)
        return resource
