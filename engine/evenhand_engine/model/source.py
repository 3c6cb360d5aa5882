"""Where a model's files are: turns what the user named into a local Hugging Face style directory.

Such a directory holds `config.json`, `*.safetensors`, `generation_config.json` and the tokenizer's files. GGUF files
and the default model are converted into one once, below the user's cache folder. Both processes of the engine call
`resolve_model_dir`; once a model is converted that imports neither torch nor transformers.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from evenhand_engine.errors import StartupError
from evenhand_engine.model import default_model
from evenhand_engine.model.cache import SHIPPED_DIR, cache_dir, cached
from evenhand_engine.model.gguf.parts import gguf_parts
from evenhand_engine.model.progress import Progress, Stage

CONVERSION_VERSION = 6
"""Part of the cache key: raise it when a conversion's result changes."""

HUB_FILES = ["*.json", "*.jinja", "model*.safetensors", "tokenizer.model"]
"""What is fetched of a hub repository: no second copy of the weights in another format."""


def resolve_model_dir(model: str | None) -> Path:
    """The directory with the files of `model`; one of a hub is downloaded, GGUF files are converted, if need be.

    `model` is a Hugging Face directory, a GGUF file, any part of a split one, or a hub id; None is the default model.
    Raises StartupError that says what to do about it.
    """
    if model is None:
        return _converted(f"{default_model.NAME}-{default_model.SHA256[:16]}", _build_default)
    path = Path(model).expanduser()
    if path.is_dir():
        return path.resolve()
    if path.is_file():
        return _converted(f"gguf-{_gguf_digest(path)[:16]}", lambda *args: _convert(path, *args))
    if path.is_absolute() or model.startswith((".", "~")) or model.count("/") > 1 or path.suffix == ".gguf":
        raise StartupError(f"model {model}: no such directory or GGUF file")
    return _hub_snapshot(model)


def _converted(name: str, build: Callable[[Path, Progress], None]) -> Path:
    def build_with_progress(directory: Path) -> None:
        with Progress() as progress:
            build(directory, progress)

    entry = f"{name}-v{CONVERSION_VERSION}"
    shipped, models_dir = SHIPPED_DIR / "models" / entry, cache_dir() / "models"
    try:
        return shipped if shipped.is_dir() else cached(models_dir / entry, build_with_progress)
    except OSError as error:
        raise StartupError(f"cannot prepare the model in {models_dir}: {error}") from error


def _build_default(directory: Path, progress: Progress) -> None:
    _convert(default_model.gguf_path(), directory, progress)
    generation_config = directory / "generation_config.json"
    recommended = json.loads(generation_config.read_text()) | default_model.RECOMMENDED_SAMPLING
    generation_config.write_text(json.dumps(recommended, indent=2))


def _convert(gguf_path: Path, directory: Path, progress: Progress) -> None:
    from evenhand_engine.model.gguf.conversion import convert_gguf  # imports torch and transformers

    convert_gguf(gguf_path, directory, progress)


def _gguf_digest(path: Path) -> str:
    """Of all parts of the file, so that a split model is one model whichever part was named."""
    digest = hashlib.sha256()
    for part in gguf_parts(path):
        with part.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise StartupError(
                    f"model {part}: not a GGUF file; give a Hugging Face directory, a hub id or a GGUF file"
                )
            file.seek(0)
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _hub_snapshot(model: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    from huggingface_hub.utils import tqdm

    stage = Stage(f"fetching {model}", total=0)

    class Bar(tqdm):  # type: ignore[misc]
        """The hub's own, which counts nothing where there is no terminal; those of bytes tell how far it has come."""

        def __init__(self, *args: Any, unit: str = "it", **options: Any) -> None:
            super().__init__(*args, unit=unit, **options)
            self._num_bytes = 0.0 if unit == "B" else None

        def update(self, n: float | None = 1) -> Any:
            if self._num_bytes is not None:
                self._num_bytes += n or 0
                stage.reach(self._num_bytes, self.total or 0)
            return super().update(n)

    try:
        return Path(snapshot_download(model, allow_patterns=HUB_FILES, tqdm_class=Bar))
    except HFValidationError as error:
        raise StartupError(f"model {model}: neither a local path nor a Hugging Face hub id: {error}") from error
    except LocalEntryNotFoundError as error:
        raise StartupError(
            f"model {model}: not in the local Hugging Face cache, and the hub cannot be reached. "
            "Give a local directory or GGUF file, or no model at all for the default one"
        ) from error
    except HfHubHTTPError as error:
        raise StartupError(f"model {model}: the Hugging Face hub refused: {error}") from error
