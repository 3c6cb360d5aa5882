"""What is stored in Secrets fits into them, and can be read by whoever comes later."""

import random

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from evenhand_policy.bootstrap import (
    MANIFEST_FILE,
    MAX_PARTS,
    DocumentTooLargeError,
    check_size,
    pack,
    pack_manifest,
    read_manifest,
)
from evenhand_policy.config import PoolReference
from evenhand_policy.push_document import Document
from evenhand_policy.push_protocol import sign_claims
from evenhand_policy.version import Assignment, Version

KEY = Ed25519PrivateKey.from_private_bytes(b"operator" * 4)
POOL = PoolReference(namespace="inference", name="default")
LARGEST_SECRET = 2**20  # of the API server, all values together, with some room for what is said beside the part
ROOM = 2**16


def document(num_bytes: int) -> Document:
    """One that is so large compressed."""
    return Document(f"sha256:{num_bytes:064x}", random.Random(num_bytes).randbytes(num_bytes), num_bytes)


def test_every_part_fits_into_a_secret_and_all_parts_hold_the_largest_document() -> None:
    largest = document(7 * 2**20)
    check_size(largest)
    parts = pack(largest)
    assert len(parts) <= MAX_PARTS
    assert max(len(content) for part in parts for content in part.values()) <= LARGEST_SECRET - ROOM
    assert b"".join(content for part in parts for content in part.values()) == largest.compressed
    with pytest.raises(DocumentTooLargeError, match=r"has 33\.0 MiB; 32 MiB are allowed"):
        check_size(Document("sha256:0", b"", 33 * 2**20))
    with pytest.raises(DocumentTooLargeError, match="7 MiB can be stored"):
        check_size(document(MAX_PARTS * LARGEST_SECRET))


def test_manifest_of_before_it_told_the_number_of_replicas_is_of_one() -> None:
    """No pod takes more than its limits for that: they are divided by no less than one."""
    made = document(100)
    assignment = Assignment(Version(3, 4), made.digest, 5)
    files = pack_manifest(KEY, (), cluster="c1", pool=POOL, assignment=assignment, parts=pack(made))
    claims = read_manifest(files, (KEY.public_key(),))
    assert claims.assignment == assignment

    class Older(msgspec.Struct):
        cluster: str
        pool: dict[str, str]
        epoch: int
        revision: int
        digest: str
        parts: list[str]

    told = {name: value for name, value in msgspec.to_builtins(claims).items() if name != "numReplicas"}
    older = {MANIFEST_FILE: sign_claims(KEY, msgspec.convert(told, Older))}
    assert read_manifest(older, (KEY.public_key(),)).assignment == assignment._replace(num_replicas=1)
