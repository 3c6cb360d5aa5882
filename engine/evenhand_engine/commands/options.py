"""Options that the two servers share, `evenhand serve` and `evenhand sidecar`, and the settings that they make."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from evenhand_engine.frontend.push_receiver import PushSettings
    from evenhand_engine.frontend.settings import ServerSettings

Command = TypeVar("Command", bound=Callable[..., Any])

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "K": 2**10, "M": 2**20, "G": 2**30}
_FILE = click.Path(path_type=Path)
_SECONDS = click.FloatRange(0, min_open=True)


def quantity(value: str) -> int:
    """A positive integer, perhaps with a suffix: 1k is 1000, 1K is 1024, as in vLLM."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kmgKMG]?)", value.strip())
    number = 0 if match is None else int(float(match[1]) * _UNITS[match[2]])
    if number < 1:
        raise click.BadParameter(f"{value!r} is not a positive number like 512, 2k or 2K.")
    return number


def server_options(*, max_request_bytes: str, max_tenant_body_bytes: str) -> Callable[[Command], Command]:
    """A decorator that adds the options of a server's front end; the arguments are defaults."""
    options = [
        click.option("--host", default="0.0.0.0", help="Address of the public port."),
        click.option("--port", type=click.IntRange(0, 65535), default=8000, help="Public port; 0 takes any free one."),
        click.option("--policies", type=_FILE, help="Directory of TenantPolicy files, watched."),
        click.option("--pool", metavar="NAMESPACE/NAME", help="EnginePool whose operator pushes the config instead."),
        click.option("--bootstrap", type=_FILE, help="Folder of the pool's mounted bootstrap Secrets."),
        click.option("--pod-token", type=_FILE, help="File of the token that proves to it which pod this is."),
        click.option("--last-good", type=_FILE, help="File that keeps the last config across restarts."),
        click.option(
            "--allow-unconfigured", is_flag=True, help="With --pool: serve before any config was loaded or pushed."
        ),
        click.option(
            "--anonymous/--no-anonymous", default=True, help="Serve requests without a key as the default tenant."
        ),
        click.option("--admin-host", default="127.0.0.1", help="Address of the admin port."),
        click.option(
            "--admin-port", type=click.IntRange(0, 65535), default=9000, help="Port that tenants must not reach."
        ),
        click.option("--ssl-certfile", type=_FILE, help="PEM certificate chain of the public port."),
        click.option("--ssl-keyfile", type=_FILE, help="Its private key."),
        click.option("--max-request-bytes", type=quantity, default=max_request_bytes, help="Largest body."),
        click.option(
            "--max-tenant-body-bytes",
            type=quantity,
            default=max_tenant_body_bytes,
            help="Most of all bodies of one tenant.",
        ),
        click.option(
            "--drain-timeout", type=click.FloatRange(0), default=30.0, help="Seconds to finish after SIGTERM."
        ),
        click.option(
            "--write-timeout",
            type=_SECONDS,
            default=60.0,
            help="Seconds that a client may leave an answer unread.",
        ),
        click.option("--log-level", type=click.Choice(["debug", "info", "warning", "error"]), default="info"),
    ]

    def add(command: Command) -> Command:
        for option in reversed(options):  # as decorators do: the last one first
            command = option(command)
        return command

    return add


def server_settings(options: dict[str, Any], **more: Any) -> "ServerSettings":
    """What `server_options` say, and `more` fields. Raises UsageError where they contradict each other."""
    from evenhand_engine.frontend.settings import ServerSettings

    same = (
        *("host", "port", "admin_host", "admin_port", "policies", "anonymous", "ssl_certfile", "ssl_keyfile"),
        *("max_request_bytes", "max_tenant_body_bytes", "drain_timeout", "write_timeout", "allow_unconfigured"),
    )
    return ServerSettings(push=_push_settings(options), **{name: options[name] for name in same}, **more)


def _push_settings(options: dict[str, Any]) -> "PushSettings | None":
    if options["pool"] is None:
        given = [
            f"--{name.replace('_', '-')}"
            for name in ("bootstrap", "pod_token", "last_good", "allow_unconfigured")
            if options[name]
        ]
        if given:
            raise click.UsageError(f"{', '.join(given)} means nothing without --pool NAMESPACE/NAME.")
        return None
    if options["policies"] is not None:
        raise click.UsageError(
            "--pool and --policies exclude each other: either an operator or files set the policies."
        )
    if options["bootstrap"] is None:
        raise click.UsageError(
            "--pool needs --bootstrap DIR, the folder where the pool's bootstrap Secrets are mounted."
        )
    namespace, slash, name = options["pool"].partition("/")
    if not (namespace and slash and name) or "/" in name:
        raise click.BadParameter(f"{options['pool']!r} is not NAMESPACE/NAME.", param_hint="--pool")
    from evenhand_engine.frontend.push_receiver import PushSettings
    from evenhand_policy.config import PoolReference

    pool = PoolReference(namespace=namespace, name=name)
    return PushSettings(pool, options["bootstrap"], options["pod_token"], options["last_good"])
