"""YAML from people: every entry of a file (they are separated by `---`) with the line of each field, bounded, nothing ambiguous let through.

Refused with the line: duplicate keys, keys that are not text, tags, recursion, nesting and expansion beyond the bounds
(a small file whose aliases stand for billions of values). No message quotes what the file holds, since it may be a key.
"""

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import yaml

MAX_FILE_BYTES = 4 * 1024 * 1024
MAX_NESTING = 32
MAX_NODES_PER_ENTRY = 20_000


class Entry(NamedTuple):
    """One entry. `lines` maps a path such as `spec.identities[0].name` to its line, from 1; "" is the entry."""

    value: Any
    lines: dict[str, int]

    def line_of(self, path: str) -> int:
        """Line of the field, or of the nearest thing around it that the file holds."""
        while path and path not in self.lines:
            path = path[: max(path.rfind("."), path.rfind("["), 0)]
        return self.lines[path]


class YamlError(ValueError):
    """A file that is not acceptable YAML; `line` is from 1, or None for the file as a whole."""

    def __init__(self, message: str, line: int | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.line = line


def read_entries(content: bytes) -> list[Entry]:
    """The entries of a file; empty ones are left out.

    Raises:
        YamlError: the content is too large, not UTF-8, not YAML, or breaks one of the rules above.
    """
    if len(content) > MAX_FILE_BYTES:
        raise YamlError(f"larger than {MAX_FILE_BYTES // 1024 // 1024} MiB; split it")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise YamlError("not UTF-8", content.count(b"\n", 0, error.start) + 1) from None
    try:
        _check_nesting(text)
        return list(_compose(text))
    except yaml.MarkedYAMLError as error:
        line = _line(error.problem_mark or error.context_mark)
        raise YamlError("not valid YAML here; check indentation, colons and quotes", line) from None
    except yaml.YAMLError:
        raise YamlError("not valid YAML: it holds a control character") from None


class _Loader(yaml.CSafeLoader):
    """Plain JSON values only, numbers as kubectl reads them: a time stays text, and so does 1:30."""


_YAML = "tag:yaml.org,2002:"
_INTEGER = re.compile(r"[-+]?(0b[01_]+|0o[0-7_]+|0x[0-9a-fA-F_]+|0[0-7_]*|[1-9][0-9_]*)\Z")
_NUMBER = re.compile(r"[-+]?(\.[0-9][0-9_]*|[0-9][0-9_]*(\.[0-9_]*)?)([eE][-+]?[0-9_]+)?\Z|[-+]?\.inf\Z|\.nan\Z", re.I)
_Loader.yaml_implicit_resolvers = {
    first: [resolver for resolver in resolvers if resolver[0].removeprefix(_YAML) not in ("timestamp", "int", "float")]
    for first, resolvers in yaml.CSafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(f"{_YAML}int", _INTEGER, list("-+0123456789"))
_Loader.add_implicit_resolver(f"{_YAML}float", _NUMBER, list("-+.0123456789"))

_PLAIN_TAGS = frozenset(f"{_YAML}{name}" for name in ("str", "int", "float", "bool", "null", "seq", "map"))


def _line(mark: Any) -> int:
    return 1 if mark is None else int(mark.line) + 1


def _check_nesting(text: str) -> None:
    """Composing recurses, so depth is bounded before it."""
    depth = 0
    for event in yaml.parse(text, Loader=yaml.CSafeLoader):
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        if depth > MAX_NESTING:
            raise YamlError(f"nested deeper than {MAX_NESTING} levels", _line(event.start_mark))


def _compose(text: str) -> Iterator[Entry]:
    loader = _Loader(text)
    try:
        while loader.check_node():
            node: Any = loader.get_node()
            lines: dict[str, int] = {}
            line = _line(node.start_mark)
            _examine(node, "", line, 0, lines)
            try:
                value = loader.construct_document(node)
            except (ValueError, KeyError):
                raise YamlError("a value in this entry cannot be read; quote it if it is text", line) from None
            if value is not None:
                yield Entry(value, lines)
    finally:
        loader.dispose()


def _examine(node: Any, path: str, line: int, depth: int, lines: dict[str, int]) -> None:
    """Fill `lines` with the fields at and below the node, refusing what the module does not let through."""
    if depth > MAX_NESTING:
        raise YamlError("an alias that refers to what it is part of", line)
    if len(lines) >= MAX_NODES_PER_ENTRY:
        raise YamlError(f"an entry of more than {MAX_NODES_PER_ENTRY} values, aliases counted", line)
    if node.tag not in _PLAIN_TAGS:
        raise YamlError("a YAML tag; write plain values only", line)
    lines[path] = line
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            _examine(item, f"{path}[{index}]", _line(item.start_mark), depth + 1, lines)
    elif isinstance(node, yaml.MappingNode):
        _examine_mapping(node, path, depth, lines)


def _examine_mapping(node: yaml.MappingNode, path: str, depth: int, lines: dict[str, int]) -> None:
    seen: set[str] = set()
    for key, value in node.value:
        line = _line(key.start_mark)
        if not isinstance(key, yaml.ScalarNode) or key.tag != f"{_YAML}str":
            raise YamlError("a key that is not text, or a merge key; write each field out, quoted if need be", line)
        if key.value in seen:
            raise YamlError(f"the field {key.value[:80]} is set twice", line)
        seen.add(key.value)
        _examine(value, f"{path}.{key.value}" if path else key.value, line, depth + 1, lines)
