"""Small parts of the server: what the process loads, its log, its limit of connections."""

import logging
import resource
import subprocess
import sys

import pytest

from evenhand_engine.logs import LineFormatter
from evenhand_engine.server.listener import allow_many_connections


@pytest.mark.parametrize("module", ["app", "admin", "startup", "run"])
def test_the_http_process_loads_neither_torch_nor_transformers(module: str) -> None:
    code = f"import sys, evenhand_engine.server.{module}; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert loaded.stdout.strip() == "[]"


def test_the_core_is_spawned_before_what_requests_need_is_imported() -> None:
    """It loads meanwhile, which takes longer."""
    code = "import sys, evenhand_engine.server.run; print([m for m in ('aiohttp', 'jinja2', 'rich', 'tokenizers') if m in sys.modules])"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert loaded.stdout.strip() == "[]"


def test_log_lines_cannot_be_forged() -> None:
    record = logging.LogRecord("x", logging.INFO, "", 0, "request", None, None)
    record.fields = {"path": "/a\n2026 INFO forged", "status": 200, "reason": "", "quote": 'a "b"'}
    line = LineFormatter().format(record)
    assert "\n" not in line
    assert line.endswith(r"""INFO x request path="/a\n2026 INFO forged" status=200 quote="a \"b\"" """.strip())
    record.msg = "two\nlines"
    assert "\n" not in LineFormatter().format(record)


def test_a_traceback_is_one_line() -> None:
    try:
        raise ValueError("a\nb")
    except ValueError:
        record = logging.LogRecord("x", logging.ERROR, "", 0, "failed", None, sys.exc_info())
    line = LineFormatter().format(record)
    assert "\n" not in line
    assert "ValueError" in line


@pytest.mark.parametrize(
    ("soft", "hard", "most"),
    [(1024, 524_288, 524_288), (256, resource.RLIM_INFINITY, 10_240), (20_000, resource.RLIM_INFINITY, 20_000)],
)
def test_as_many_connections_as_the_system_allows(
    monkeypatch: pytest.MonkeyPatch, soft: int, hard: int, most: int
) -> None:
    limits = [(soft, hard)]
    monkeypatch.setattr(resource, "getrlimit", lambda _: limits[-1])
    monkeypatch.setattr(resource, "setrlimit", lambda _, limit: limits.append(limit))
    allow_many_connections()
    assert limits[-1] == (most, hard), "macOS refuses an infinite soft limit, though its hard one is"


def test_the_system_takes_the_limit() -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        allow_many_connections()
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] >= before[0]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
