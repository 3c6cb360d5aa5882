"""Files of a Pod's volumes, as a kubelet writes them: Secrets, projected Secrets and tokens, and empty folders.

Each volume is a folder whose entries are links through `..data`, so that a change of several files is seen whole.
"""

import base64
import os
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

Object = dict[str, Any]


class SecretMissing(Exception):
    """A Secret that the Pod needs is not there (yet)."""


def token_audiences(pod: Object) -> set[str]:
    """Audiences of the tokens that the Pod is to be given; that for the API server aside."""
    sources = (
        source.get("serviceAccountToken", {})
        for volume in pod["spec"].get("volumes", [])
        for source in volume.get("projected", {}).get("sources", [])
    )
    return {source["audience"] for source in sources if source.get("audience")}


def write_volumes(pod: Object, stored: Mapping[str, Object], tokens: Mapping[str, str], directory: Path) -> None:
    """Brings the volumes below `directory` up to date with the namespace's Secrets by name and the Pod's tokens by
    audience. Raises SecretMissing."""
    for volume in pod["spec"].get("volumes", []):
        folder = directory / volume["name"]
        if "emptyDir" in volume:
            folder.mkdir(parents=True, exist_ok=True)
        elif "secret" in volume:
            write_folder(folder, secret_files(volume["secret"], volume["secret"]["secretName"], stored))
        elif "projected" in volume:
            files: dict[str, bytes] = {}
            for source in volume["projected"]["sources"]:
                token = source.get("serviceAccountToken", {})
                if "secret" in source:
                    files |= secret_files(source["secret"], source["secret"]["name"], stored)
                elif token.get("audience"):  # that for the API server, and what comes with it, is needed by nobody here
                    files[token["path"]] = tokens[token["audience"]].encode()
            write_folder(folder, files)


def secret_files(source: Object, name: str, stored: Mapping[str, Object]) -> dict[str, bytes]:
    """Contents by path. Raises SecretMissing, unless the source is optional."""
    if name not in stored:
        if source.get("optional"):
            return {}
        raise SecretMissing(f'secret "{name}" not found')
    data = {key: base64.b64decode(value) for key, value in stored[name].get("data", {}).items()}
    items = source.get("items") or [{"key": key, "path": key} for key in data]
    return {each["path"]: data[each["key"]] for each in items if each["key"] in data}


def write_folder(folder: Path, files: Mapping[str, bytes]) -> None:
    """Makes `folder` hold exactly these files, all at once; does nothing where it does already."""
    link = folder / "..data"
    if link.exists() and {path.name: path.read_bytes() for path in link.iterdir()} == files:
        return
    folder.mkdir(parents=True, exist_ok=True)
    before = link.resolve() if link.exists() else None
    version = folder / f"..{secrets.token_hex(4)}"
    version.mkdir()
    for name, contents in files.items():
        (version / name).write_bytes(contents)
    (folder / "..new").symlink_to(version.name)
    os.replace(folder / "..new", link)
    for name in files:
        if not (folder / name).is_symlink():
            (folder / name).symlink_to(f"..data/{name}")
    for path in folder.iterdir():
        if not path.name.startswith("..") and path.name not in files:
            path.unlink()
    if before:
        shutil.rmtree(before)
