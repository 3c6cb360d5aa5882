"""What the documents say of the repository is true: links lead somewhere, commands and options exist."""

import re
from pathlib import Path

import click
import pytest

from evenhand_engine.commands.cli import main

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted(
    [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("manifests/**/*.md"), *ROOT.glob("charts/*.md")]
)
FENCED = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def anchors(document: Path) -> set[str]:
    """What GitHub calls the headings of a document."""
    headings = re.findall(r"^#+ (.+)$", FENCED.sub("", document.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=relative)
def test_every_relative_link_leads_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", FENCED.sub("", document.read_text())):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = document.parent / path if path else document
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target


def test_the_readme_leads_to_every_document() -> None:
    text = (ROOT / "README.md").read_text()
    assert [relative(path) for path in ROOT.glob("docs/*.md") if f"({relative(path)})" not in text] == []


def test_every_picture_is_shown() -> None:
    texts = "".join(document.read_text() for document in DOCUMENTS)
    assert [path.name for path in ROOT.glob("docs/images/*") if f"images/{path.name}" not in texts] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=relative)
def test_every_make_target_exists(document: Path) -> None:
    makefile = (ROOT / "Makefile").read_text()
    named = set(re.findall(r"(?:^|`)make ([\w-]+)", document.read_text(), re.MULTILINE))
    for target in named - {"bench-NAME"}:
        script = ROOT / f"benchmarks/{target.removeprefix('bench-').replace('-', '_')}.py"
        assert script.exists() or re.search(rf"^{target}:", makefile, re.MULTILINE), target


def options(command: str) -> set[str]:
    """Every spelling of every option."""
    return {name for option in main.commands[command].params for name in (*option.opts, *option.secondary_opts)}


def test_every_option_of_serve_is_documented() -> None:
    text = (ROOT / "docs/api.md").read_text()
    for option in main.commands["serve"].params:
        if isinstance(option, click.Option) and option.name != "help":
            assert any(f"`{name}`" in text or f"`{name} " in text for name in (*option.opts, *option.secondary_opts)), (
                option
            )


@pytest.mark.parametrize("document", DOCUMENTS, ids=relative)
@pytest.mark.parametrize("command", ["serve", "simulate", "lint"])
def test_every_option_in_a_command_exists(document: Path, command: str) -> None:
    for line in re.findall(rf"evenhand {command}\b([^`\n]*(?:\\\n[^`\n]*)*)", document.read_text()):
        assert set(re.findall(r"--[a-z][a-z-]+", line)) <= options(command), line
