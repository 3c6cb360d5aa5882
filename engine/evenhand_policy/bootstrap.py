"""The document as engines find it when they start while no operator is there: compressed, in Secrets that they mount.

The operator keeps up to `MAX_PARTS` Secrets `evenhand-bootstrap-POOL-INDEX` beside the pool. A pod mounts all of them,
optional, into one folder, which then holds `manifest.json`, its signatures, and `part-0` to at most `part-7`. Secrets
change one by one, so a folder may hold parts of two documents; the manifest tells, and only a complete set is loaded.
"""

import zlib
from collections.abc import Mapping

import msgspec

from evenhand_policy.push_protocol import MAX_DOCUMENT_BYTES, PushKeys, body_digest, is_signed, sign

MAX_PARTS = 8
PART_BYTES = 900 * 2**10  # a Secret holds 1 MiB at most
SECRET_TYPE = "evenhand.dev/bootstrap"
_PURPOSE = "bootstrap"
_MANIFEST, _SIGNATURES = "manifest.json", "manifest.signatures"


class BootstrapError(ValueError):
    """The set of parts is incomplete, not signed by the pool's push key, or damaged; the message says which."""


class DocumentTooLargeError(ValueError):
    """The compressed document does not fit into `MAX_PARTS` Secrets."""


class Manifest(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """What makes a set of parts one document; members that a newer operator adds are ignored.

    Attributes:
        epoch: of the document.
        revision: of the document.
        digest: of the document, uncompressed.
        parts: digest of each part, in order.
        num_replicas: among how many engines the pool's limits were divided at the time.
    """

    epoch: int
    revision: int
    digest: str
    parts: tuple[str, ...]
    num_replicas: int = 1


def secret_name(pool: str, index: int) -> str:
    """Name of the Secret that holds a part."""
    return f"evenhand-bootstrap-{pool}-{index}"


def pack(document: bytes, epoch: int, revision: int, num_replicas: int, keys: PushKeys) -> list[dict[str, bytes]]:
    """Contents of the Secrets, by index; the manifest is in the first.

    Raises:
        DocumentTooLargeError: there would have to be more than `MAX_PARTS`.
    """
    compressed = zlib.compress(document)
    parts = [compressed[start : start + PART_BYTES] for start in range(0, len(compressed), PART_BYTES)]
    if len(parts) > MAX_PARTS:
        most = MAX_PARTS * PART_BYTES // 2**20
        raise DocumentTooLargeError(f"compressed, the document has {len(compressed) / 2**20:.1f} MiB; {most} MiB fit")
    manifest = msgspec.json.encode(
        Manifest(
            epoch=epoch,
            revision=revision,
            digest=body_digest(document),
            parts=tuple(map(body_digest, parts)),
            num_replicas=num_replicas,
        )
    )
    secrets = [{f"part-{index}": part} for index, part in enumerate(parts)]
    signatures = "\n".join(sign(key, _PURPOSE, body_digest(manifest)) for key in keys)
    secrets[0] |= {_MANIFEST: manifest, _SIGNATURES: signatures.encode()}
    return secrets


def unpack(files: Mapping[str, bytes], keys: PushKeys) -> tuple[Manifest, bytes]:
    """The manifest and the document of a set of parts.

    Raises:
        BootstrapError: nothing is unpacked unless every part is the one that the signed manifest names.
    """
    if _MANIFEST not in files:
        raise BootstrapError("there is no manifest")
    signatures = files.get(_SIGNATURES, b"").decode("ascii", "replace").split()
    digest = body_digest(files[_MANIFEST])
    if not any(is_signed(key, each, _PURPOSE, digest) for key in keys for each in signatures[:MAX_PARTS]):
        raise BootstrapError("the manifest is signed by none of the push keys")
    try:
        manifest = msgspec.json.decode(files[_MANIFEST], type=Manifest)
    except msgspec.DecodeError as error:
        raise BootstrapError(f"the manifest cannot be read: {error}") from None
    parts = [files.get(f"part-{index}", b"") for index in range(len(manifest.parts))]
    if tuple(map(body_digest, parts)) != manifest.parts:
        raise BootstrapError("a part is missing or of another document")
    return manifest, _decompress(b"".join(parts), manifest.digest)


def _decompress(compressed: bytes, digest: str) -> bytes:
    try:
        document = zlib.decompressobj().decompress(compressed, MAX_DOCUMENT_BYTES)
    except zlib.error as error:
        raise BootstrapError(f"the parts cannot be decompressed: {error}") from None
    if body_digest(document) != digest:
        raise BootstrapError("the document is not the one that the manifest names")
    return document
