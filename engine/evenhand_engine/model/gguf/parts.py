"""The files of a model that was split by llama.cpp's `gguf-split`: NAME-00001-of-00003.gguf and so on."""

import re
from pathlib import Path

from evenhand_engine.errors import StartupError

_PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")


def gguf_parts(path: Path) -> list[Path]:
    """All parts of the model that `path` is a part of, in order; only itself if its name is not that of a part.

    Raises StartupError that names a missing part.
    """
    match = _PART.fullmatch(path.name)
    if match is None:
        return [path]
    count = int(match["count"])
    if not 1 <= int(match["number"]) <= count:
        raise StartupError(f"model {path}: there is no part {int(match['number'])} of {count}: give the path of a part")
    parts = [path.with_name(f"{match['stem']}-{number:05}-of-{count:05}.gguf") for number in range(1, count + 1)]
    for part in parts:
        if not part.is_file():
            raise StartupError(f"model {path}: part {part.name} is missing beside it: all {count} parts are needed")
    return parts
