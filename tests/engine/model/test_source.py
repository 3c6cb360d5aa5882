"""What the user names becomes a directory, or one clear message; the cache survives races and kills."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from evenhand_engine.errors import StartupError
from evenhand_engine.model import default_model, source
from evenhand_engine.model.cache import cached
from evenhand_engine.model.source import CONVERSION_VERSION, resolve_model_dir


def test_a_directory_is_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_model_dir(str(tmp_path)) == tmp_path
    monkeypatch.chdir(tmp_path.parent)
    assert resolve_model_dir(f"./{tmp_path.name}") == tmp_path


@pytest.mark.parametrize("model", ["/no/such/dir", "./missing", "~/missing", "a/b/c", "missing.gguf"])
def test_a_missing_path_is_not_taken_for_a_hub_id(model: str) -> None:
    with pytest.raises(StartupError, match="no such directory or GGUF file"):
        resolve_model_dir(model)


def test_another_file_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_text("something")
    with pytest.raises(StartupError, match="not a GGUF file"):
        resolve_model_dir(str(tmp_path / "model.bin"))


def _resolve_elsewhere(model: str | None, **environment: str) -> str:
    """Resolve in a fresh interpreter; its outcome as one line."""
    code = (
        "import sys\n"
        "from evenhand_engine.errors import StartupError\n"
        "from evenhand_engine.model.source import resolve_model_dir\n"
        "try:\n"
        f"    print(resolve_model_dir({model!r}), sorted({{'torch', 'transformers', 'gguf'}} & set(sys.modules)))\n"
        "except StartupError as error:\n"
        "    print('StartupError', error)\n"
    )
    command, environment = [sys.executable, "-c", code], os.environ | environment
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280, check=True)
    return done.stdout.strip()


def test_a_converted_model_is_found_without_heavy_imports(tmp_path: Path) -> None:
    name = f"{default_model.NAME}-{default_model.SHA256[:16]}-v{CONVERSION_VERSION}"
    model_dir = tmp_path / "evenhand" / "models" / name
    model_dir.mkdir(parents=True)
    assert _resolve_elsewhere(None, XDG_CACHE_HOME=str(tmp_path)) == f"{model_dir} []"


def test_a_model_that_the_installation_brings_is_taken_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source, "SHIPPED_DIR", tmp_path / "shipped")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "never made"))
    name = f"{default_model.NAME}-{default_model.SHA256[:16]}-v{CONVERSION_VERSION}"
    (tmp_path / "shipped/models" / name).mkdir(parents=True)
    assert resolve_model_dir(None) == tmp_path / "shipped/models" / name
    assert not (tmp_path / "never made").exists()


def test_the_default_model_needs_an_empty_cache_folder_and_no_program(tmp_path: Path) -> None:
    outcome = _resolve_elsewhere(None, XDG_CACHE_HOME=str(tmp_path), PATH="/nowhere")
    [model_dir] = tmp_path.glob("evenhand/models/smollm2-*-v*[0-9]")
    assert outcome.startswith(f"{model_dir} [")
    assert (model_dir / "model.safetensors").stat().st_size > 50_000_000


def test_an_unreachable_hub_is_said_so(tmp_path: Path) -> None:
    outcome = _resolve_elsewhere("some/model", HF_ENDPOINT="http://127.0.0.1:9", HF_HOME=str(tmp_path))
    assert outcome.startswith("StartupError model some/model: not in the local Hugging Face cache, and the hub cannot")


def test_an_invalid_hub_id_is_said_so(tmp_path: Path) -> None:
    outcome = _resolve_elsewhere("no--such..id", HF_ENDPOINT="http://127.0.0.1:9", HF_HOME=str(tmp_path))
    assert outcome.startswith("StartupError model no--such..id: neither a local path nor a Hugging Face hub id")


def test_only_one_of_many_builds_an_entry(tmp_path: Path) -> None:
    builds: list[Path] = []
    results: list[list[str]] = []
    together = threading.Barrier(4)

    def build(directory: Path) -> None:
        builds.append(directory)
        (directory / "a").write_text("1")
        assert not (tmp_path / "entry").exists(), "it must not be seen before it is complete"
        (directory / "b").write_text("2")

    def ask() -> None:
        together.wait()
        results.append(sorted(path.name for path in cached(tmp_path / "entry", build).iterdir()))

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(builds) == 1
    assert results == [["a", "b"]] * 4


def test_a_build_that_died_is_done_again(tmp_path: Path) -> None:
    def die(directory: Path) -> None:
        (directory / "half").write_text("")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cached(tmp_path / "entry", die)
    assert not (tmp_path / "entry").exists()

    entry = cached(tmp_path / "entry", lambda directory: (directory / "whole").touch())
    assert [path.name for path in entry.iterdir()] == ["whole"]


def test_a_cache_folder_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "evenhand").write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(StartupError, match=r"cannot prepare the model in .*evenhand/models"):
        resolve_model_dir(None)
