"""`evenhand lint`: the files that a pipeline would apply, judged as the operator would, without a cluster."""

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from evenhand_policy.lint import LintReport

STDIN = "-"


@click.command()
@click.argument("paths", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path, allow_dash=True))
@click.option("--format", "output", type=click.Choice(["text", "json", "github"]), default="text")
@click.option("--strict", is_flag=True, help="Count what could not be checked as an error.")
def lint(paths: tuple[Path, ...], output: str, strict: bool) -> None:
    """Judge TenantPolicies and EnginePools in YAML files as the operator would, without a cluster.

    Folders are searched for *.yaml, *.yml and *.json; - is standard input. All are judged together, with the Secrets and
    Namespaces among them; objects of other kinds are passed over. The exit status is 1 where something would be refused, or
    where there is no policy and no pool at all.

    \b
    evenhand lint policies/
    kubectl kustomize overlays/prod | evenhand lint --format github -
    """
    from evenhand_policy.lint import Level, lint

    report = lint(_contents(paths))
    {"text": _show_text, "json": _show_json, "github": _show_github}[output](report)
    errors, notes = report.count(Level.ERROR), report.count(Level.NOTE)
    looked_at = f"{report.num_policies} policies and {report.num_pools} pools"
    click.echo(f"{looked_at}: {errors} errors, {notes} not checked", err=True)
    if errors or (strict and notes) or not (report.num_policies or report.num_pools):
        sys.exit(1)


def _contents(paths: Iterable[Path]) -> Iterator[tuple[str, bytes]]:
    """Name and content of each file; those that cannot be read end the program with status 2."""
    from evenhand_policy.files import MAX_FILES, cause_of, read_bounded
    from evenhand_policy.yaml_reader import MAX_FILE_BYTES

    files = [file for path in paths for file in _files(path)]
    if len(files) > MAX_FILES:
        raise click.UsageError(f"More than {MAX_FILES} files; name fewer at once.")
    for file in dict.fromkeys(files):
        if str(file) == STDIN:
            yield "<stdin>", sys.stdin.buffer.read(MAX_FILE_BYTES + 1)
            continue
        try:
            yield str(file), read_bounded(file)
        except OSError as error:
            raise click.UsageError(f"{file} cannot be read: {cause_of(error)}.") from None


def _files(path: Path) -> list[Path]:
    from evenhand_policy.files import is_policy_file

    if not path.is_dir():
        return [path]
    return sorted(
        file
        for file in path.rglob("*")
        if is_policy_file(file) and not any(part.startswith(".") for part in file.relative_to(path).parts)
    )


def _show_text(report: "LintReport") -> None:
    for level, finding in report.remarks:
        where = finding.file if finding.line is None else f"{finding.file}:{finding.line}"
        click.echo(f"{where}: {level}: {finding.text}")


def _show_json(report: "LintReport") -> None:
    import msgspec

    rows = [{"level": level, **finding._asdict()} for level, finding in report.remarks]
    click.echo(msgspec.json.format(msgspec.json.encode(rows)).decode())


def _show_github(report: "LintReport") -> None:
    """Commands of GitHub's workflows, by which a change's lines are marked."""
    for level, finding in report.remarks:
        command = {"error": "error", "note": "notice"}[level]
        place = (
            f"file={_property(finding.file)},line={finding.line or 1},title={_property(finding.reason or 'evenhand')}"
        )
        click.echo(f"::{command} {place}::{_escaped(finding.text)}")


def _property(text: str) -> str:
    return _escaped(text).replace(":", "%3A").replace(",", "%2C")


def _escaped(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")
