"""Where an engine's config is when no operator is there to push it: mounted Secrets, then the pod's own last good file."""

import contextlib
import logging
import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from evenhand_policy.bootstrap import KEYS_FILE, MANIFEST_FILE, BootstrapError, mounted_keys, unpack
from evenhand_policy.config import SchedulerConfig
from evenhand_policy.push_document import (
    MAX_DOCUMENT_BYTES,
    DocumentRejectedError,
    encode_document,
    open_document,
)
from evenhand_policy.push_protocol import ConfigSource
from evenhand_policy.signatures import PublicKeys
from evenhand_policy.version import Assignment, Version

log = logging.getLogger(__name__)

_MAX_FILE_BYTES = 2**20


@dataclass(frozen=True, slots=True)
class ConfigDocument:
    """A config, what was said beside it, where it came from, and the document as it came, compressed."""

    config: SchedulerConfig
    assignment: Assignment
    source: ConfigSource
    compressed: bytes = field(repr=False)

    @classmethod
    def unversioned(cls, config: SchedulerConfig, source: ConfigSource) -> "ConfigDocument":
        """One that no operator has sent: this engine enforces it alone, and whatever is pushed is newer."""
        document = encode_document(config)
        return cls(config, Assignment(Version(0, 0), document.digest, 1), source, document.compressed)


class _LastGood(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    epoch: int
    revision: int
    digest: str
    num_replicas: int
    document: bytes


class LastGoodFile:
    """The last document that this pod enforced, in a folder that outlives the container, such as an emptyDir."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def save(self, stored: ConfigDocument) -> None:
        """Replace the file as a whole; only its owner may read it. Raises OSError."""
        assignment = stored.assignment
        content = _LastGood(
            epoch=assignment.version.epoch,
            revision=assignment.version.revision,
            digest=assignment.digest,
            num_replicas=assignment.num_replicas,
            document=stored.compressed,
        )
        self._path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=self._path.parent, prefix=".last-good-")  # with mode 0600
        try:
            with open(descriptor, "wb") as file:
                file.write(msgspec.json.encode(content))
                file.flush()
                os.fsync(file.fileno())
            os.replace(name, self._path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(name)
            raise

    def load(self) -> ConfigDocument | None:
        """What was saved; None where there is nothing, or nothing usable, which is logged."""
        try:
            content = msgspec.json.decode(_read_file(self._path, 2 * MAX_DOCUMENT_BYTES), type=_LastGood)
            config = open_document(content.document, content.digest)
        except FileNotFoundError:
            return None
        except (OSError, msgspec.DecodeError, DocumentRejectedError) as error:
            log.warning("the last good config cannot be used", extra={"fields": {"error": str(error)}})
            return None
        version = Version(content.epoch, content.revision)
        assignment = Assignment(version, content.digest, max(1, content.num_replicas))
        return ConfigDocument(config, assignment, ConfigSource.LAST_GOOD, content.document)


class BootstrapFolder:
    """Where the pool's bootstrap Secrets are mounted; read anew each time, since they change."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def keys(self) -> PublicKeys:
        """The operator's public keys; none where there is no file with them."""
        try:
            return mounted_keys({KEYS_FILE: _read_file(self._folder / KEYS_FILE, _MAX_FILE_BYTES)})
        except OSError:
            return ()

    def read(self) -> ConfigDocument | None:
        """The document to start with; None where there is none that is usable, which is logged."""
        files = _read_folder(self._folder)
        if MANIFEST_FILE not in files:
            return None  # nothing is stored yet, as in a pool that is new
        try:
            manifest, compressed = unpack(files, mounted_keys(files))
            config = open_document(compressed, manifest.digest)
        except (BootstrapError, DocumentRejectedError) as error:
            log.warning("the mounted bootstrap config cannot be used", extra={"fields": {"error": str(error)}})
            return None
        return ConfigDocument(config, manifest.assignment, ConfigSource.BOOTSTRAP, compressed)


def _read_folder(folder: Path) -> dict[str, bytes]:
    """Files of a mounted volume by name, all of one moment; its own links, which begin with a dot, are left out."""
    while True:
        snapshot = _snapshot(folder)
        try:
            names = [entry.name for entry in os.scandir(snapshot) if not entry.name.startswith(".")]
            return {name: _read_file(snapshot / name, _MAX_FILE_BYTES) for name in names}
        except OSError as error:
            if _snapshot(folder) != snapshot:
                continue  # it was replaced meanwhile
            if not isinstance(error, FileNotFoundError):
                log.warning("a mounted folder cannot be read", extra={"fields": {"error": str(error)}})
            return {}


def _snapshot(folder: Path) -> Path:
    """Where the files really are: a mounted Secret is replaced as a whole by moving the link `..data`."""
    return (folder / "..data").resolve() if (folder / "..data").is_symlink() else folder


def _read_file(path: Path, limit: int) -> bytes:
    with path.open("rb") as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise OSError(f"{path} has more than {limit} bytes")
    return content
