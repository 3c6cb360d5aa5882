"""`evenhand sidecar`: parses arguments and nothing else. What it needs is imported when it runs."""

import sys
import urllib.parse
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from evenhand_engine.commands.options import quantity, server_options, server_settings

if TYPE_CHECKING:
    from evenhand_engine.server.startup import Running

_UPSTREAM_KEY_VARIABLE = "EVENHAND_UPSTREAM_API_KEY"


def _origin(ctx: click.Context, param: click.Parameter, value: str) -> str:
    """scheme://host:port, or unix:/path."""
    if value.startswith("unix:/"):
        return value
    parts = urllib.parse.urlsplit(value)
    try:
        is_origin = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        is_origin = False
    if not is_origin or parts.path.strip("/") or parts.query or parts.fragment or parts.username:
        raise click.BadParameter(f"{value!r} is not http://HOST:PORT or unix:/PATH.", ctx, param)
    return value.rstrip("/")


@click.command()
@click.option(
    "--upstream",
    required=True,
    callback=_origin,
    help="The engine: http://127.0.0.1:8001, or unix:/path of a socket.",
)
@click.option("--upstream-api-key", envvar=_UPSTREAM_KEY_VARIABLE, help="Bearer token that the upstream wants.")
@click.option(
    "--upstream-priority",
    type=click.Choice(["off", "vllm", "sglang"]),
    default="off",
    help="Pass on the tenant's class as `priority`, in whose sense.",
)
@click.option(
    "--upstream-cache-salt/--no-upstream-cache-salt", default=False, help="Salt prefix caches by tenant: vLLM."
)
@click.option("--upstream-connect-timeout", type=click.FloatRange(0, min_open=True), default=5.0)
@click.option(
    "--upstream-idle-timeout",
    type=click.FloatRange(0, min_open=True),
    default=600.0,
    help="Seconds without a byte after which an answer has failed.",
)
@click.option("--max-model-len", type=quantity, default="128K", help="The upstream's context.")
@click.option("--kv-tokens", type=quantity, help="Size of its KV cache in tokens; default: what it says of itself.")
@click.option(
    "--max-num-seqs", type=quantity, help="Most requests that it runs at once; default: what it says of itself."
)
@click.option(
    "--tokenizer",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="Directory with the model's tokenizer.json, to count prompts with.",
)
@click.option(
    "--api-server-count",
    type=click.IntRange(1, 64),
    default=1,
    help="Processes that pass requests on; above 1 one more decides.",
)
@server_options(max_request_bytes="32M", max_tenant_body_bytes="256M")
def sidecar(**options: Any) -> None:
    """Share an engine that you already run: queue, order and bound what tenants send to vLLM, SGLang or llama.cpp.

    \b
    evenhand sidecar --upstream http://127.0.0.1:8001 --policies policies/
    """
    import asyncio

    import uvloop

    from evenhand_engine.backends.upstream_connection import UpstreamSettings
    from evenhand_engine.errors import StartupError
    from evenhand_engine.logs import configure_logging
    from evenhand_engine.server.run import run_until_stopped
    from evenhand_engine.server.sidecar_startup import start_sidecar

    configure_logging(options["log_level"])
    is_socket = options["upstream"].startswith("unix:")
    upstream = UpstreamSettings(
        url="http://localhost" if is_socket else options["upstream"],
        socket=Path(options["upstream"].removeprefix("unix:")) if is_socket else None,
        api_key=options["upstream_api_key"] or None,
        connect_timeout=options["upstream_connect_timeout"],
        idle_timeout=options["upstream_idle_timeout"],
        max_model_len=options["max_model_len"],
        kv_tokens=options["kv_tokens"],
        max_num_seqs=options["max_num_seqs"],
    )
    settings = server_settings(options, api_server_count=options["api_server_count"])

    async def run() -> int:
        server = start_sidecar(
            settings,
            upstream,
            priority=options["upstream_priority"],
            salts_caches=options["upstream_cache_salt"],
            tokenizer=options["tokenizer"],
        )
        return await run_until_stopped(server, _announce)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        try:
            code = runner.run(run())
        except StartupError as error:
            click.echo(f"evenhand: {error}", err=True)
            code = 1
    sys.exit(code)


def _announce(running: "Running") -> None:
    click.echo(f"\nEvenhand shares the upstream at {running.url}\n", err=True)
