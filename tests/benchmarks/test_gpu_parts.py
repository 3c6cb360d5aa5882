"""What a part of `make gpu` may do: its figures are kept, its end is told in one line, and nothing of it is left."""

import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
Script = Callable[..., tuple[str, ...]]


def has_ended(pid: int) -> bool:
    """By now, or soon."""
    try:
        process = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    with os.fdopen(process):
        return bool(select.select([process], [], [], 60)[0])


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gpu_parts

    return gpu_parts


@pytest.fixture
def script(tmp_path: Path) -> Script:
    """The command line of a part that does this."""

    def make(text: str) -> tuple[str, ...]:
        path = tmp_path / "part.py"
        path.write_text("import json, os, signal, subprocess, sys, time\n" + text)
        return (str(path),)

    return make


TELLS = "print(json.dumps({'a': 1}), flush=True)\n"


@pytest.mark.parametrize(
    ("text", "limit", "problem"),
    [
        (TELLS, 60, None),
        (TELLS + "sys.exit('too hot')", 60, "exit status 1: too hot"),
        (TELLS + "time.sleep(600)", 2, "its 2 s were up: no message"),
        (TELLS + "os.kill(os.getpid(), signal.SIGKILL)", 60, "killed by SIGKILL: no message"),
        (TELLS + "print('oh', file=sys.stderr); os.abort()", 60, "killed by SIGABRT: oh"),
        (TELLS + "sys.stderr.buffer.write(bytes([0xff, 10])); sys.exit(3)", 60, "exit status 3: \ufffd"),
    ],
)
def test_its_end_is_told_and_its_figures_are_kept(
    parts: ModuleType, script: Script, text: str, limit: float, problem: str | None
) -> None:
    ended = parts.run(parts.Part("x", script(text), 60, ("a",)), (), limit)
    assert (ended.problem, ended.figures) == (problem, {"a": 1})


def test_what_is_no_figure_is_passed_over(parts: ModuleType) -> None:
    lines = ["{", '{"a": 1}', "[" * 100_000, '{"b": ' + "[" * 100_000, '"c"', '{"d": NaN, "e": [Infinity]}', '{"f": 1']
    assert parts.figures_of("\n".join(lines)) == {"a": 1, "d": None, "e": [None]}


def test_a_part_that_prints_garbage_alone_has_not_ended_well(parts: ModuleType, script: Script) -> None:
    text = "sys.stdout.buffer.write(os.urandom(100_000) + bytes(100_000))"
    ended = parts.run(parts.Part("x", script(text), 60, ("a", "b")), (), 60)
    assert (ended.problem, ended.figures) == ("it ended without a word of a, b: no message", {})


def test_nothing_that_it_has_started_is_left(parts: ModuleType, script: Script) -> None:
    """Which would hold the device."""
    text = "print(json.dumps({'child': subprocess.Popen(['sleep', '600']).pid}), flush=True)\n"
    for end in ("", "os.kill(os.getpid(), signal.SIGKILL)"):
        child = parts.run(parts.Part("x", script(text + end), 60, ()), (), 60).figures["child"]
        assert has_ended(child)


def test_the_figures_of_a_full_disk(parts: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is known already stays, and what is written is whole or not there."""
    path = tmp_path / "results" / "gpu.json"
    assert parts.write(path, {"a": 1}) is None

    def full(self: Path, *_: object, **__: object) -> None:
        self.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    assert parts.write(path, {"a": 2}) == f"{path}: results cannot be written: No space left on device"
    assert json.loads(path.read_text()) == {"a": 1} and list(path.parent.iterdir()) == [path]


SANITIZER = """#!/bin/sh
echo "$@" > {directory}/asked
echo "$PYTORCH_NO_CUDA_MEMORY_CACHING" >> {directory}/asked
while [ "${{1#--}}" != "$1" ]; do shift 2; done
echo "========= COMPUTE-SANITIZER"
"$@" || exit
{says}
"""


def sanitized(tmp_path: Path, says: str) -> tuple[subprocess.CompletedProcess[str], dict[str, object]]:
    """`make gpu`, emulated, with a compute-sanitizer that says this and runs no more than the device's name needs."""
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(SANITIZER.format(directory=tmp_path, says=says))
    tool.chmod(0o755)
    part = tmp_path / "gpu_correctness.py"
    part.write_text("""print('{"sanitized": {"cases": 1, "failed": []}}')""")
    program = (
        "import gpu, gpu_parts, pathlib, sys\n"
        f"gpu_parts.HERE = pathlib.Path({str(tmp_path)!r})\n"
        "gpu.device_name = lambda *_: 'emulated'\n"
        f"sys.argv = ['gpu.py', '--device', 'emulated', '--only', 'sanitizer', '--out', {str(tmp_path)!r}]\n"
        "sys.exit(gpu.main())"
    )
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": str(BENCHMARKS)}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=300, env=environment, check=False
    )
    return done, json.loads((tmp_path / "emulated.json").read_text())


def test_the_sanitizer_watches_the_cases(tmp_path: Path) -> None:
    done, figures = sanitized(tmp_path, 'echo "========= ERROR SUMMARY: 0 errors"')
    assert done.returncode == 0, done.stderr
    assert figures["sanitized"] == {"cases": 1, "failed": []}
    asked, caching = (tmp_path / "asked").read_text().splitlines()
    options, _, rest = asked.partition(f" {sys.executable} ")
    assert f"{options} ".count("--") == 6 and "--error-exitcode 9" in options and "--report-api-errors no" in options
    assert rest == f"{tmp_path}/gpu_correctness.py --cases few --device emulated --seed 0" and caching == "1"


@pytest.mark.parametrize(
    ("says", "problem"),
    [
        (
            'echo "========= Invalid __shared__ read of size 16 bytes"\necho "=========     at attention+0x90"\nexit 9',
            "exit status 9: ========= Invalid __shared__ read of size 16 bytes",
        ),
        (
            'echo "========= Error: No attachable process found"',
            "compute-sanitizer has watched nothing: ========= Error",
        ),
        ("true", "compute-sanitizer has watched nothing: no summary"),
    ],
)
def test_what_the_sanitizer_finds_is_told(tmp_path: Path, says: str, problem: str) -> None:
    done, figures = sanitized(tmp_path, says)
    assert done.returncode == 1 and f"sanitizer: {problem}" in done.stderr
    told = figures["parts"]["sanitizer"]
    assert told["problem"].startswith(problem) and told["report"][0] == "========= COMPUTE-SANITIZER"


def test_a_stop_from_outside_keeps_what_is_known(tmp_path: Path) -> None:
    """As of a job whose time is up: the part ends too, and none comes after it."""
    os.mkfifo(tmp_path / "running")
    (tmp_path / "gpu_correctness.py").write_text(
        "import json, os, time\n"
        "print(json.dumps({'cases': {'cases': 7, 'failed': []}, 'pid': os.getpid()}), flush=True)\n"
        f"open({str(tmp_path / 'running')!r}, 'w').close()\n"
        "time.sleep(600)"
    )
    program = (
        "import gpu, gpu_parts, pathlib, sys\n"
        f"gpu_parts.HERE = pathlib.Path({str(tmp_path)!r})\n"
        "gpu.device_name = lambda *_: 'emulated'\n"
        f"sys.argv = ['gpu.py', '--device', 'emulated', '--out', {str(tmp_path)!r}]\n"
        "sys.exit(gpu.main())"
    )
    environment = os.environ | {"PYTHONPATH": str(BENCHMARKS)}
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    try:
        (tmp_path / "running").read_text()
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    figures = json.loads((tmp_path / "emulated.json").read_text())
    assert figures == json.loads(out.splitlines()[-1]) and figures["cases"]["cases"] == 7
    assert list(figures["parts"]) == ["cases"] and process.returncode == 1
    assert "cases: stopped from outside" in err and has_ended(figures["pid"])
