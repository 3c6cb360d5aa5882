"""Where an engine's config is when no operator is there to push it: mounted Secrets, then the pod's own last good file."""

import contextlib
import logging
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import msgspec

from evenhand_policy.bootstrap import BootstrapError, unpack
from evenhand_policy.config import SchedulerConfig
from evenhand_policy.push_document import DocumentRejectedError, read_document
from evenhand_policy.push_protocol import MAX_DOCUMENT_BYTES, ConfigSource, PushKeys, body_digest, read_push_keys

log = logging.getLogger(__name__)

_MAX_FILE_BYTES = 2**20


@dataclass(frozen=True, slots=True)
class StoredConfig:
    """A config and where it came from. `digest` is that of the document as it was pushed."""

    config: SchedulerConfig
    digest: str
    num_replicas: int
    source: ConfigSource

    @property
    def version(self) -> tuple[int, int]:
        """What decides between two: epoch and revision."""
        return self.config.epoch, self.config.revision


def built_in_config() -> StoredConfig:
    """Everybody shares evenly, nobody is known."""
    config = SchedulerConfig()
    return StoredConfig(config, config.digest(), 1, ConfigSource.BUILT_IN)


class _LastGood(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    digest: str
    num_replicas: int
    document: msgspec.Raw


class LastGoodFile:
    """The last document that this pod enforced, in a folder that outlives the container, such as an emptyDir."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def save(self, document: bytes, num_replicas: int) -> None:
        """Replace the file as a whole; only its owner may read it. Raises OSError."""
        content = _LastGood(digest=body_digest(document), num_replicas=num_replicas, document=msgspec.Raw(document))
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

    def load(self) -> StoredConfig | None:
        """What was saved; None where there is nothing, or nothing usable, which is logged."""
        try:
            content = msgspec.json.decode(_read_file(self._path, 2 * MAX_DOCUMENT_BYTES), type=_LastGood)
            document = bytes(content.document)
            if body_digest(document) != content.digest:
                raise DocumentRejectedError("", "the file is damaged")
            config = read_document(document)
        except FileNotFoundError:
            return None
        except (OSError, msgspec.DecodeError, DocumentRejectedError) as error:
            log.warning("the last good config cannot be used", extra={"fields": {"error": str(error)}})
            return None
        return StoredConfig(config, content.digest, max(1, content.num_replicas), ConfigSource.LAST_GOOD)


class PushKeyFolder:
    """The pool's push keys in the folder where their Secret is mounted; read anew each time, since it changes."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def keys(self) -> PushKeys:
        """The keys; none where the folder cannot be read."""
        return read_push_keys(_read_folder(self._folder))


def read_bootstrap(folder: Path, keys: PushKeys) -> StoredConfig | None:
    """The document in the folder where the bootstrap Secrets are mounted; None where there is none that is usable."""
    files = _read_folder(folder)
    if not files:
        return None
    try:
        manifest, document = unpack(files, keys)
        config = read_document(document)
    except (BootstrapError, DocumentRejectedError) as error:
        log.warning("the mounted bootstrap config cannot be used", extra={"fields": {"error": str(error)}})
        return None
    return StoredConfig(config, manifest.digest, max(1, manifest.num_replicas), ConfigSource.BOOTSTRAP)


def _read_folder(folder: Path) -> dict[str, bytes]:
    """Files of a mounted volume by name; its own links, which begin with a dot, are left out."""
    try:
        names = [entry.name for entry in os.scandir(folder) if not entry.name.startswith(".")]
        return {name: _read_file(folder / name, _MAX_FILE_BYTES) for name in names}
    except OSError as error:
        if not isinstance(error, FileNotFoundError):
            log.warning("a mounted folder cannot be read", extra={"fields": {"error": str(error)}})
        return {}


def _read_file(path: Path, limit: int) -> bytes:
    with path.open("rb") as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise OSError(f"{path} has more than {limit} bytes")
    return content
