"""Specs of our kinds, drawn from the schemas of their CRDs: sound ones, and such with one thing wrong."""

import re
from typing import Any

from hypothesis import strategies as st

from evenhand_policy.pool import EnginePool
from evenhand_policy.spec import TenantPolicy
from schema.crd import engine_pool_crd, tenant_policy_crd

Object = dict[str, Any]

TEXTS = [
    *(
        "a",
        "web-1",
        "a.b",
        "a..b",
        "A",
        "X_1",
        "example.org/app",
        "a/b/c",
        "!~",
        "a b",
        "-a",
        "a-",
        "a\n",
        "\u00e9",
        "",
    ),
    *("a" * 63, "a" * 64, "a" * 253, "a" * 254, "a" * 317, "a" * 318),
    *(
        "0f7cdb7e-4b5a-4f4e-8f52-3f7d2f1d9c11",
        "0F7cdb7e-4b5a-4f4e-8f52-3f7d2f1d9c11",
        "0f7cdb7e-4b5a-4f4e-8f52-3f7d2f1d9c1",
    ),
    *("0ms", "1ms", "59s", "1m", "1m1ms", "1h", "60m1ms", "23h60m", "24h1ms", "99999h", "1d", "1.5s", "-1s", "1ms" * 5),
]
JUNK: list[Any] = [*TEXTS, None, True, False, 0, -1, 1.0, 2.5, 2**70, [], [None], {}, {"x": 1}, {"name": "a"}]


def sound(schema: dict[str, Any]) -> st.SearchStrategy[Any]:
    """Values that keep the bounds of a schema, if not every rule between its fields."""
    match schema:
        case {"enum": members}:
            return st.sampled_from(members)
        case {"type": "string", "maxLength": most}:
            shape = re.compile(schema.get("pattern", "").replace("$", r"\Z"))
            return st.sampled_from([text for text in TEXTS if shape.search(text) and len(text) <= most])
        case {"type": "integer", "minimum": least, "maximum": most}:
            return st.integers(least, most) | st.sampled_from([least, most, float(least)])
        case {"type": "boolean"}:
            return st.booleans()
        case {"type": "array", "items": {"properties": {"name": _}} as item}:
            entries = st.lists(sound(item), max_size=3)
            return entries.map(lambda items: [{**each, "name": f"n{index}"} for index, each in enumerate(items)])
        case {"type": "array", "items": item}:
            return st.lists(sound(item), min_size=schema.get("minItems", 0), max_size=3)
        case {"additionalProperties": value}:
            return st.dictionaries(st.sampled_from(["a", "example.org/app", "B_c"]), sound(value), max_size=3)
        case {"properties": properties}:
            required = set(schema.get("required", ()))
            members = {name: sound(member) for name, member in properties.items()}
            return st.fixed_dictionaries(
                {name: member for name, member in members.items() if name in required},
                optional={name: member for name, member in members.items() if name not in required},
            ).map(lambda obj: consistent(obj, properties))
    raise AssertionError(schema)


def consistent(obj: Object, properties: dict[str, Any]) -> Object:
    """The object with the members that its discriminator asks for, and no others."""
    match obj:
        case {"type": "APIKey", "name": name}:
            return {"name": name, "type": "APIKey", "apiKey": {"secretRef": {"name": "keys"}}}
        case {"type": "ServiceAccount" as kind, "name": name}:
            return {"name": name, "type": kind, "serviceAccount": obj.get("serviceAccount", {"name": "web"})}
        case {"type": "ServiceAccountNamespace" as kind, "name": name}:
            return {"name": name, "type": kind, "serviceAccountNamespace": obj.get("serviceAccountNamespace", {})}
        case {"type": "Header" as kind, "name": name}:
            return {"name": name, "type": kind, "header": obj.get("header", {"value": "v"})}
        case {"operator": "In" | "NotIn"}:
            return obj | {"values": obj.get("values") or ["a"]}
        case {"operator": operator, "key": key}:
            return {"operator": operator, "key": key}
        case {"from": "Selector" as where}:
            return {"from": where, "selector": obj.get("selector", {})}
    if "from" in properties:
        return {name: value for name, value in obj.items() if name == "from"}
    if "serviceAccountTokens" in properties and not any(obj["selector"].values()):
        return obj | {"selector": {"matchLabels": {"app": "engine"}}}
    return obj


def spec_schema(crd: Object) -> dict[str, Any]:
    """Of the only version of a kind."""
    schema: dict[str, Any] = crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]
    return schema


KINDS: dict[str, tuple[str, type[TenantPolicy | EnginePool], dict[str, Any]]] = {
    "TenantPolicy": ("tenantpolicies", TenantPolicy, spec_schema(tenant_policy_crd())),
    "EnginePool": ("enginepools", EnginePool, spec_schema(engine_pool_crd())),
}


def edges(schema: dict[str, Any] | None) -> list[Any]:
    """What may be just right or just wrong in the place of a value."""
    match schema:
        case {"enum": members}:
            return [*members, members[0].lower(), *JUNK]
        case {"minimum": least, "maximum": most}:
            return [least - 1, least, most, most + 1, float(most), least + 0.5, *JUNK]
    return JUNK


def spoil(draw: st.DrawFn, value: Any, schema: dict[str, Any] | None) -> Any:
    """The value with one thing in it replaced, removed or added."""
    schema = schema or {}
    children = list(range(len(value))) if isinstance(value, list) else sorted(value) if isinstance(value, dict) else []
    if children and draw(st.integers(0, 4)) > 0:
        key = draw(st.sampled_from(children))
        below = schema.get("items") or schema.get("properties", {}).get(key) or schema.get("additionalProperties")
        return type(value)(
            [spoil(draw, item, below) if index == key else item for index, item in enumerate(value)]
            if isinstance(value, list)
            else {name: spoil(draw, item, below) if name == key else item for name, item in value.items()}
        )
    if isinstance(value, dict) and draw(st.booleans()):
        if draw(st.booleans()) and children:
            gone = draw(st.sampled_from(children))
            return {name: item for name, item in value.items() if name != gone}
        name = draw(st.sampled_from([*sorted(schema.get("properties", {})), "x", "y z"]))
        return value | {name: draw(st.sampled_from(edges(schema.get("properties", {}).get(name))))}
    if isinstance(value, list) and value and draw(st.booleans()):
        return value * draw(st.sampled_from([2, 17, 33]))
    return draw(st.sampled_from(edges(schema)))


@st.composite
def specs(draw: st.DrawFn, kind: str) -> Any:
    """Half of them have one thing wrong, or perhaps just right."""
    schema = KINDS[kind][2]
    spec = draw(sound(schema))
    return spoil(draw, spec, schema) if draw(st.booleans()) else spec
