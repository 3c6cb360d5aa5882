"""The reference of all fields in docs/policies.md, written from the CRDs, so that it cannot go stale.

`python -m schema.reference FILE` (`make crds`) replaces what stands between the marks of each kind.
"""

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from schema.crd import engine_pool_crd, tenant_policy_crd

Json = dict[str, Any]


def replace_tables(text: str) -> str:
    """The document with the table of each kind renewed.

    Raises:
        ValueError: a kind's marks are missing.
    """
    for crd in (tenant_policy_crd(), engine_pool_crd()):
        kind = crd["spec"]["names"]["kind"]
        marks = re.search(rf"(?<=<!-- fields of {kind} -->\n).*?(?=<!-- end -->)", text, flags=re.DOTALL)
        if marks is None:
            raise ValueError(f"the document lacks `<!-- fields of {kind} -->` or `<!-- end -->` after it")
        text = text[: marks.start()] + _table(crd) + text[marks.end() :]
    return text


def _table(crd: Json) -> str:
    schema = crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]
    rows = [f"| `{path}` | {values} | {default} | {meaning} |" for path, values, default, meaning in _rows("", schema)]
    return "\n".join(["| field | values | default | meaning |", "| --- | --- | --- | --- |", *rows]) + "\n"


def _rows(path: str, schema: Json) -> Iterator[tuple[str, str, str, str]]:
    """Path, values, default and meaning of each field below a schema; what a field contains follows it."""
    required = schema.get("required", [])
    for name, member in schema.get("properties", {}).items():
        own = f"{path}.{name}".lstrip(".")
        default = "required" if name in required else _default(member)
        rules = "; ".join(rule["message"] for rule in _rules(member))
        meaning = f"{member['description']} Rules: {rules}." if rules else member["description"]
        yield own, _values(member), default, meaning.replace("|", "\\|")
        item = member.get("items")
        yield from _rows(f"{own}[]" if item else own, item or member)


def _rules(schema: Json) -> list[Json]:
    return [rule for part in (schema, schema.get("items", {})) for rule in part.get("x-kubernetes-validations", [])]


def _default(schema: Json) -> str:
    if "default" not in schema or isinstance(schema["default"], dict):
        return ""
    value = schema["default"]
    if isinstance(value, list):
        return ", ".join(f"`{item}`" for item in value)
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def _values(schema: Json) -> str:
    match schema:
        case {"enum": members}:
            return ", ".join(f"`{member}`" for member in members)
        case {"type": "integer", "minimum": least, "maximum": most}:
            return f"{least:,} to {most:,}"
        case {"type": "string", "pattern": pattern} if "h|m|s|ms" in pattern:
            return "duration"
        case {"type": "string", "maxLength": most}:
            return f"text, at most {most} characters"
        case {"type": "array", "items": {"enum": members}}:
            return "list of " + ", ".join(f"`{member}`" for member in members)
        case {"type": "array", "maxItems": most}:
            return f"list, at most {most}"
        case {"additionalProperties": _, "maxProperties": most}:
            return f"map, at most {most}"
    return str(schema["type"])


if __name__ == "__main__":
    file = Path(sys.argv[1])
    file.write_text(replace_tables(file.read_text()))
