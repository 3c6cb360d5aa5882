"""The published OpenAPI document, made of the routes and the structs that bodies are decoded as and answers described by."""

import functools
import inspect
import re
import types
import typing
from collections.abc import Iterable, Iterator
from importlib.metadata import version
from typing import Annotated, Any

import msgspec
from aiohttp import web

from evenhand_engine.openai.answers import Error
from evenhand_engine.openai.errors import STATUSES
from evenhand_engine.server.routes import ROUTES, Route

_REFERENCE = "#/components/schemas/{name}"
_CREDENTIALS = {
    "bearer": {"type": "http", "scheme": "bearer"},
    "apiKey": {"type": "apiKey", "in": "header", "name": "x-api-key"},
}
_HEADERS = {
    "X-Request-Id": ("The end of the answer's id, and in the log.", "string"),
    "X-Evenhand-Reason": ("The same as `error.code`.", "string"),
    "Retry-After": ("Seconds after which a retry can succeed.", "integer"),
}
_OF_BODIES = {408, 413, 415, 429, 501}  # statuses that only what has a body can get
_NEVER_OPEN = {400, 401, 403, 404}  # and those that what anybody may ask cannot


async def show_openapi(request: web.Request) -> web.Response:
    return web.Response(body=_document(), content_type="application/json")


@functools.cache
def _document() -> bytes:
    return msgspec.json.encode(document())


def document(routes: Iterable[Route] = ROUTES) -> dict[str, Any]:
    """OpenAPI 3.1."""
    routes = list(routes)
    schemas = _Schemas([Error, *(kind for r in routes for kind in (r.body, r.answer, r.event) if kind)])
    paths: dict[str, dict[str, Any]] = {}
    for route in routes:
        path = re.sub(r"\{(\w+):[^}]*\}", r"{\1}", route.path)
        paths.setdefault(path, {})[route.method.lower()] = _operation(route, path, schemas)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Evenhand",
            "version": version("evenhand"),
            "description": "OpenAI's API, with vLLM's extensions. What each field does: docs/api.md.",
        },
        "paths": paths,
        "components": {
            "schemas": schemas.components,
            "securitySchemes": _CREDENTIALS,
            "headers": {
                name.lower(): {"description": text, "schema": {"type": kind}} for name, (text, kind) in _HEADERS.items()
            },
            "responses": {
                f"status{status}": {
                    "description": f"Refused: {kind}",
                    "headers": _headers("X-Request-Id", "X-Evenhand-Reason", "Retry-After"),
                    "content": {"application/json": {"schema": schemas.of(Error)}},
                }
                for status, kind in STATUSES.items()
            },
        },
    }


def _operation(route: Route, path: str, schemas: "_Schemas") -> dict[str, Any]:
    operation: dict[str, Any] = {
        "operationId": f"{route.method.lower()}{re.sub(r'[^a-zA-Z0-9]+', '_', path)}".rstrip("_"),
        "summary": (inspect.getdoc(route.handler) or route.handler.__name__.replace("_", " ")).splitlines()[0],
        "responses": {"200": _success(route, schemas)} | _refusals(route),
        "security": [] if route.is_open else [{name: []} for name in _CREDENTIALS],
    }
    if parameters := [*_of_path(path), *_of_query(route)]:
        operation["parameters"] = parameters
    if route.body is not None:
        content = {"application/json": {"schema": schemas.of(route.body)}}
        operation["requestBody"] = {"required": True, "content": content}
    return operation


def _of_path(path: str) -> Iterator[dict[str, Any]]:
    for name in re.findall(r"\{(\w+)\}", path):
        yield {"name": name, "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}


def _of_query(route: Route) -> Iterator[dict[str, Any]]:
    for name, values in route.query:
        yield {"name": name, "in": "query", "schema": {"type": "string", "enum": list(values)}}


def _success(route: Route, schemas: "_Schemas") -> dict[str, Any]:
    content: dict[str, Any] = {}
    if route.answer is str:
        content["text/plain"] = {"schema": {"type": "string"}}
    elif route.answer is not None:
        content["application/json"] = {"schema": schemas.of(route.answer)}
    if route.event is not None:
        described = {"x-event": schemas.of(route.event)} if _is_struct(route.event) else {}
        content["text/event-stream"] = {"schema": {"type": "string"}, **described}
    return {"description": "Done.", "headers": _headers("X-Request-Id")} | ({"content": content} if content else {})


def _refusals(route: Route) -> dict[str, Any]:
    left_out = (_NEVER_OPEN if route.is_open else set()) | (_OF_BODIES if route.body is None else set()) | {405}
    return {
        str(status): {"$ref": f"#/components/responses/status{status}"} for status in STATUSES if status not in left_out
    }


def _headers(*names: str) -> dict[str, Any]:
    return {name: {"$ref": f"#/components/headers/{name.lower()}"} for name in names}


class _Schemas:
    """JSON schemas of types, with a component for each struct. A raw member's is that of what it holds.

    Attributes:
        components: by name.
    """

    def __init__(self, kinds: Iterable[Any]) -> None:
        found: dict[Any, None] = {}
        for kind in kinds:
            _collect(kind, found)
        schemas, self.components = msgspec.json.schema_components(list(found), ref_template=_REFERENCE)
        self._schemas = {repr(kind): schema for kind, schema in zip(found, schemas, strict=True)}
        for component in self.components.values():
            if "description" in component:
                component["description"] = inspect.cleandoc(component["description"])
        for kind in found:
            if _is_struct(kind):
                for name, held in _raw_members(kind):
                    several = [self.of(one) for one in held] + [{"type": "null"}]
                    self.components[kind.__name__]["properties"][name] = {"anyOf": several}

    def of(self, kind: Any) -> dict[str, Any]:
        return self._schemas[repr(kind)]


def _collect(kind: Any, found: dict[Any, None]) -> None:
    """The type, the structs in it, and what their raw members hold."""
    if kind in found:
        return
    if _is_struct(kind):
        found[kind] = None
        for hint in typing.get_type_hints(kind, include_extras=True).values():
            _collect_parts(hint, found)
        for _, held in _raw_members(kind):
            for one in held:
                found.setdefault(one, None)
                _collect(one, found) if _is_struct(one) else _collect_parts(one, found)
    else:
        found[kind] = None
        _collect_parts(kind, found)


def _collect_parts(hint: Any, found: dict[Any, None]) -> None:
    for part in (hint, *typing.get_args(hint)):
        if _is_struct(part):
            _collect(part, found)
        elif part is not hint:
            _collect_parts(part, found)


def _raw_members(kind: Any) -> Iterator[tuple[str, tuple[Any, ...]]]:
    for name, hint in typing.get_type_hints(kind, include_extras=True).items():
        for part in typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,):
            if typing.get_origin(part) is Annotated:
                for note in part.__metadata__:
                    if isinstance(note, msgspec.Meta) and note.extra and "kinds" in note.extra:
                        yield name, note.extra["kinds"]


def _is_struct(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, msgspec.Struct)
