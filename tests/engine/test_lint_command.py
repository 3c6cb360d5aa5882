"""`evenhand lint`: what is read, what is printed in each format, and the exit status that a pipeline goes by."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from evenhand_engine.commands.cli import main

ROOT = Path(__file__).parents[2]
POLICY = "apiVersion: evenhand.dev/v1alpha1\nkind: TenantPolicy\nmetadata: {name: a, namespace: inference}\nspec:\n"
POOL = POLICY.replace("TenantPolicy", "EnginePool").replace("name: a", "name: default")
SELECTOR = "  selector: {matchLabels: {app: x}}\n---\n"
SOUND, BAD = POOL + SELECTOR + POLICY + "  weight: 2\n", POOL + SELECTOR + POLICY + "  weigth: 2\n"


def run(*arguments: str | Path, stdin: str = "") -> Result:
    return CliRunner().invoke(main, ["lint", *map(str, arguments)], input=stdin)


def test_sound_files_end_well_and_bad_ones_do_not() -> None:
    assert (run("-", stdin=SOUND).exit_code, run("-", stdin=SOUND).stdout) == (0, "")
    result = run("-", stdin=BAD)
    assert result.exit_code == 1
    assert result.stdout == "<stdin>:11: error: spec.weigth: unknown field; did you mean `weight`? [Invalid]\n"
    assert result.stderr == "0 policies and 1 pools: 1 errors, 0 not checked\n"


def test_json_has_each_remark_as_an_object() -> None:
    [row] = json.loads(run("--format", "json", "-", stdin=BAD).stdout)
    assert row == {
        "level": "error",
        "file": "<stdin>",
        "line": 11,
        "message": "unknown field; did you mean `weight`?",
        "field": "spec.weigth",
        "reason": "Invalid",
        "resource": {"kind": "TenantPolicy", "namespace": "inference", "name": "a"},
    }
    assert json.loads(run("--format", "json", "-", stdin=SOUND).stdout) == []


def test_github_marks_the_line(tmp_path: Path) -> None:
    (tmp_path / "a,b.yaml").write_text(BAD.replace("weigth: 2", "weight: 0"))
    result = run("--format", "github", tmp_path)
    place = f"file={tmp_path}/a%2Cb.yaml,line=11,title=Invalid"
    assert result.stdout == f"::error {place}::spec.weight: expected an integer from 1 to 1000 [Invalid]\n"
    note = run("--format", "github", "-", stdin=POLICY + "  weight: 1\n")
    assert note.stdout.startswith("::notice file=<stdin>,line=4,title=evenhand::spec.poolRef: not checked: ")
    assert note.exit_code == 0


def test_strict_takes_what_was_not_checked_for_an_error() -> None:
    assert run("-", stdin=POLICY + "  weight: 1\n").exit_code == 0
    assert run("--strict", "-", stdin=POLICY + "  weight: 1\n").exit_code == 1
    assert run("--strict", "-", stdin=SOUND).exit_code == 0


def test_folders_are_searched_and_judged_together(tmp_path: Path) -> None:
    for name, text in (
        ("pool.yaml", POOL + SELECTOR),
        ("teams/a.yml", POLICY + "  tenant: seat\n"),
        ("teams/b.json", json.dumps({"kind": "ConfigMap"})),
        ("teams/deeper/c.yaml", POLICY.replace("name: a", "name: c") + "  tenant: seat\n"),
        (".git/d.yaml", BAD),
        ("teams/e.txt", BAD),
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    result = run(tmp_path, tmp_path / "pool.yaml")
    assert result.stdout.startswith(f"{tmp_path}/teams/deeper/c.yaml:5: error: spec.tenant: tenant seat is already")
    assert result.stdout.count("\n") == 1


def test_nothing_to_judge_is_a_mistake(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("kind: ConfigMap\n")
    assert run(tmp_path).exit_code == 1
    assert run(tmp_path / "nowhere").exit_code == 2
    assert run().exit_code == 2


def test_a_file_that_cannot_be_read_is_a_mistake(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").mkdir()
    (tmp_path / "a.yaml/b.yaml").write_text(SOUND)
    assert run(tmp_path).exit_code == 0
    (tmp_path / "c.yaml").symlink_to("/proc/self/mem")
    assert "c.yaml cannot be read: Input/output error" in run(tmp_path).stderr


@pytest.mark.parametrize("overlay", ["demo", "guest", "gateway"])
def test_our_own_examples_are_sound(overlay: str) -> None:
    assert run(ROOT / "manifests/examples" / overlay).exit_code == 0
