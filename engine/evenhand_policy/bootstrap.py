"""What engines find mounted: whom to believe, and the document to start with while no operator is there.

The operator keeps Secrets beside the pool: `evenhand-bootstrap-POOL-manifest` with its public keys and a signed manifest,
and up to `MAX_PARTS` with the compressed document, `evenhand-bootstrap-POOL-INDEX`. A pod mounts all of them into one
folder, the parts optional, so that it is not started before it knows whom to believe. Secrets change one by one, so a
folder may hold parts of two documents; the manifest tells, and only a complete set is loaded.
"""

from collections.abc import Mapping

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from evenhand_policy.config import PoolReference
from evenhand_policy.push_document import MAX_DOCUMENT_BYTES, Document, body_digest
from evenhand_policy.push_protocol import read_claims, sign_claims
from evenhand_policy.signatures import PublicKeys, read_key_set, write_key_set
from evenhand_policy.version import Assignment, Version

MAX_PARTS = 8
PART_BYTES = 900 * 2**10  # a Secret holds 1 MiB at most
SECRET_TYPE = "evenhand.dev/bootstrap"
KEYS_FILE, MANIFEST_FILE = "operator-keys.json", "manifest.jwt"


class BootstrapError(ValueError):
    """The set of parts is incomplete, not signed by the operator, or damaged; the message says which."""


class DocumentTooLargeError(ValueError):
    """The document can neither be pushed nor stored."""


class Manifest(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """What makes a set of parts one document; members that a newer operator adds are ignored.

    Attributes:
        cluster: of the document.
        pool: of the document.
        epoch: of the assignment.
        revision: of the assignment.
        digest: of the document, uncompressed.
        parts: digest of each part, in order.
        num_replicas: among how many engines the pool's limits were divided at the time.
    """

    cluster: str
    pool: PoolReference
    epoch: int
    revision: int
    digest: str
    parts: tuple[str, ...]
    num_replicas: int = 1

    @property
    def assignment(self) -> Assignment:
        """What is stored."""
        return Assignment(Version(self.epoch, self.revision), self.digest, max(1, self.num_replicas))


def secret_name(pool: str, index: int | None) -> str:
    """Name of the Secret that holds a part; None: of that with the manifest."""
    return f"evenhand-bootstrap-{pool}-{'manifest' if index is None else index}"


def check_size(document: Document) -> None:
    """Raises DocumentTooLargeError."""
    if document.size > MAX_DOCUMENT_BYTES:
        most = MAX_DOCUMENT_BYTES // 2**20
        raise DocumentTooLargeError(f"the document has {document.size / 2**20:.1f} MiB; {most} MiB are allowed")
    if len(document.compressed) > MAX_PARTS * PART_BYTES:
        size, most = len(document.compressed) / 2**20, MAX_PARTS * PART_BYTES // 2**20
        raise DocumentTooLargeError(f"compressed, the document has {size:.1f} MiB; {most} MiB can be stored")


def pack(document: Document) -> list[dict[str, bytes]]:
    """Contents of the Secrets with the parts, by index."""
    compressed = document.compressed
    starts = range(0, len(compressed), PART_BYTES)
    return [{f"part-{index}": compressed[start : start + PART_BYTES]} for index, start in enumerate(starts)]


def pack_manifest(
    key: Ed25519PrivateKey,
    trusted: PublicKeys,
    *,
    cluster: str,
    pool: PoolReference,
    assignment: Assignment | None,
    parts: list[dict[str, bytes]],
) -> dict[str, bytes]:
    """Contents of the Secret with the keys and, where there is an assignment, the manifest."""
    files = {KEYS_FILE: write_key_set(trusted)}
    if assignment is not None:
        manifest = Manifest(
            cluster=cluster,
            pool=pool,
            epoch=assignment.version.epoch,
            revision=assignment.version.revision,
            digest=assignment.digest,
            parts=tuple(body_digest(part) for each in parts for part in each.values()),
            num_replicas=assignment.num_replicas,
        )
        files[MANIFEST_FILE] = sign_claims(key, manifest)
    return files


def mounted_keys(files: Mapping[str, bytes]) -> PublicKeys:
    """Whom to believe."""
    return read_key_set(files.get(KEYS_FILE, b""))


def read_manifest(files: Mapping[str, bytes], keys: PublicKeys) -> Manifest:
    """The manifest. Raises BootstrapError."""
    if MANIFEST_FILE not in files:
        raise BootstrapError("there is no manifest")
    claims = read_claims(keys, files[MANIFEST_FILE])
    if claims is None:
        raise BootstrapError("the manifest is signed by none of the operator's keys")
    try:
        return msgspec.convert(claims, Manifest)
    except msgspec.ValidationError as error:
        raise BootstrapError(f"the manifest cannot be read: {error}") from None


def unpack(files: Mapping[str, bytes], keys: PublicKeys) -> tuple[Manifest, bytes]:
    """The manifest, and the document that it names, compressed, of a set of parts.

    Raises:
        BootstrapError: nothing is unpacked unless every part is the one that the signed manifest names.
    """
    manifest = read_manifest(files, keys)
    parts = [files.get(f"part-{index}", b"") for index in range(len(manifest.parts))]
    if tuple(map(body_digest, parts)) != manifest.parts:
        raise BootstrapError("a part is missing or of another document")
    return manifest, b"".join(parts)
