"""The command line: a group of commands, each in its own module."""

import click

from evenhand_engine.commands.lint import lint
from evenhand_engine.commands.serve import serve
from evenhand_engine.commands.sidecar import sidecar
from evenhand_engine.commands.simulate import simulate


@click.group(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.version_option(package_name="evenhand")
def main() -> None:
    """Evenhand: fair sharing of one LLM between teams."""


main.add_command(lint)
main.add_command(serve)
main.add_command(sidecar)
main.add_command(simulate)
