"""Prints what is in an image as a CycloneDX document: the Python packages beside this interpreter, and the system's."""

import importlib.metadata
import json
import subprocess
import sys
import uuid


def component(name: str, version: str, kind: str) -> dict[str, str]:
    """One package, by the name that scanners know it by."""
    return {"type": "library", "name": name, "version": version, "purl": f"pkg:{kind}/{name.lower()}@{version}"}


def main() -> None:
    """Components by name, so that the same packages are the same document but for its number."""
    packages = [component(each.name, each.version, "pypi") for each in importlib.metadata.distributions()]
    query = ["dpkg-query", "--show", "--showformat", "${Package} ${Version}\n"]
    listed = subprocess.run(query, check=True, capture_output=True, text=True).stdout
    packages += [component(*line.split(), "deb/debian") for line in listed.splitlines()]
    packages.sort(key=lambda each: each["purl"])
    number = uuid.uuid5(uuid.NAMESPACE_URL, json.dumps(packages)).urn
    document = {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": number,
        "version": 1,
        "components": packages,
    }
    json.dump(document, sys.stdout, indent=1)


if __name__ == "__main__":
    main()
