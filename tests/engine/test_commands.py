"""Commands can be started: every option's default is read as its value on the command line would be."""

import click
import pytest

from evenhand_engine.commands.serve import serve
from evenhand_engine.commands.sidecar import sidecar


@pytest.mark.parametrize(("command", "arguments"), [(serve, []), (sidecar, ["--upstream", "http://127.0.0.1:1"])])
def test_defaults_are_read(command: click.Command, arguments: list[str]) -> None:
    context = command.make_context(command.name, arguments)
    assert isinstance(context.params["max_request_bytes"], int)
    for option in command.params:
        if isinstance(option.type, click.types.FuncParamType):
            assert not isinstance(option.default, int), f"{option.name}'s default is no text that it could read"
