"""`evenhand serve`: parses arguments and nothing else. What it needs is imported when it runs."""

import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from evenhand_engine.frontend.push_receiver import PushSettings
    from evenhand_engine.server.startup import Running

_API_KEY_VARIABLE = "EVENHAND_API_KEY"
_DTYPES = ["auto", "float32", "bfloat16", "float16"]
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "K": 2**10, "M": 2**20, "G": 2**30}


def quantity(value: str) -> int:
    """A positive integer, perhaps with a suffix: 1k is 1000, 1K is 1024, as in vLLM."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kmgKMG]?)", value.strip())
    number = 0 if match is None else int(float(match[1]) * _UNITS[match[2]])
    if number < 1:
        raise click.BadParameter(f"{value!r} is not a positive number like 512, 2k or 2K.")
    return number


@click.command()
@click.argument("model", required=False)
@click.option("--host", default="0.0.0.0", help="Address of the public port.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, help="Public port; 0 takes any free one.")
@click.option("--served-model-name", multiple=True, help="Name that clients ask for; may be repeated.")
@click.option("--dtype", type=click.Choice(_DTYPES), default="auto", help="Of the weights; auto: as they come.")
@click.option(
    "--kv-cache-dtype", type=click.Choice(_DTYPES), default="auto", help="auto: as the weights; float16 if quantised."
)
@click.option(
    "--quantization", type=click.Choice(["none", "int8"]), default="none", help="Of weights that are not yet."
)
@click.option(
    "--device",
    type=click.Choice(["auto", "cpu", "cuda", "emulated"]),
    metavar="[auto|cpu|cuda]",
    default="auto",
    help="What computes; auto: a GPU where there is one.",
)
@click.option(
    "--gpu-memory-utilization",
    type=click.FloatRange(0, 1, min_open=True),
    default=0.9,
    help="Part of a GPU's memory to take: the KV cache gets what weights and activations leave.",
)
@click.option("--load-format", type=click.Choice(["auto", "dummy"]), default="auto", help="dummy: random weights.")
@click.option("--max-model-len", type=quantity, help="Most tokens of one request; default: the model's own.")
@click.option("--max-num-seqs", type=quantity, help="Most requests running at once; default: by the device.")
@click.option("--max-num-batched-tokens", type=quantity, help="Most tokens in one step; default: by the device.")
@click.option("--kv-cache-memory-bytes", type=quantity, help="Memory of the KV cache; default: by the device.")
@click.option("--enable-prefix-caching/--no-enable-prefix-caching", default=True)
@click.option("--scheduling-policy", type=click.Choice(["fair", "fcfs", "static"]), default="fair")
@click.option("--record-steps", type=click.Path(path_type=Path), help="CSV file to write every step's time to.")
@click.option(
    "--replay-steps", type=click.Path(path_type=Path), help="Take step sizes from such a file, over and over."
)
@click.option("--seed", type=click.IntRange(0), default=0, help="Of dummy weights.")
@click.option("--policies", type=click.Path(path_type=Path), help="Directory of TenantPolicy files, watched.")
@click.option("--pool", metavar="NAMESPACE/NAME", help="EnginePool whose operator pushes the config instead.")
@click.option("--bootstrap", type=click.Path(path_type=Path), help="Folder of the pool's mounted bootstrap Secrets.")
@click.option(
    "--pod-token", type=click.Path(path_type=Path), help="File of the token that proves to it which pod this is."
)
@click.option("--last-good", type=click.Path(path_type=Path), help="File that keeps the last config across restarts.")
@click.option("--allow-unconfigured", is_flag=True, help="With --pool: serve before any config was loaded or pushed.")
@click.option("--anonymous/--no-anonymous", default=True, help="Serve requests without a key as the default tenant.")
@click.option("--admin-host", default="127.0.0.1", help="Address of the admin port.")
@click.option("--admin-port", type=click.IntRange(0, 65535), default=9000, help="Port that tenants must not reach.")
@click.option("--ssl-certfile", type=click.Path(path_type=Path), help="PEM certificate chain of the public port.")
@click.option("--ssl-keyfile", type=click.Path(path_type=Path), help="Its private key.")
@click.option("--api-key", envvar=_API_KEY_VARIABLE, help="Demand this key of requests that no policy's key proves.")
@click.option("--max-request-bytes", type=quantity, default="4M", help="Largest body.")
@click.option("--max-tenant-body-bytes", type=quantity, default="64M", help="Most of all bodies of one tenant.")
@click.option("--drain-timeout", type=click.FloatRange(0), default=30.0, help="Seconds to finish after SIGTERM.")
@click.option(
    "--write-timeout",
    type=click.FloatRange(0, min_open=True),
    default=60.0,
    help="Seconds that a client may leave an answer unread.",
)
@click.option(
    "--queue-heartbeat",
    type=click.FloatRange(0, min_open=True),
    help="Seconds between comments in a stream whose request waits; default: none.",
)
@click.option("--log-level", type=click.Choice(["debug", "info", "warning", "error"]), default="info")
def serve(model: str | None, **options: Any) -> None:
    """Serve MODEL over an OpenAI-compatible API.

    MODEL is a Hugging Face directory, a hub id or a GGUF file; without it SmolLM2-135M-Instruct is served.
    """
    if options["api_key"] == "" or (options["api_key"] is None and os.environ.get(_API_KEY_VARIABLE) == ""):
        raise click.UsageError(f"--api-key or {_API_KEY_VARIABLE} is empty: set a key, or neither.")
    import asyncio

    import uvloop

    from evenhand_engine.config import EngineConfig, SchedulingPolicy
    from evenhand_engine.errors import StartupError
    from evenhand_engine.frontend.settings import ServerSettings
    from evenhand_engine.logs import configure_logging
    from evenhand_engine.server.run import serve as serve_until_stopped

    configure_logging(options["log_level"])
    config = EngineConfig(
        model=model,
        device=options["device"],
        gpu_memory_utilization=options["gpu_memory_utilization"],
        load_format=options["load_format"],
        dtype=options["dtype"],
        kv_cache_dtype=options["kv_cache_dtype"],
        quantization=options["quantization"],
        max_model_len=options["max_model_len"],
        max_num_seqs=options["max_num_seqs"],
        max_num_batched_tokens=options["max_num_batched_tokens"],
        kv_cache_bytes=options["kv_cache_memory_bytes"],
        enable_prefix_caching=options["enable_prefix_caching"],
        scheduling_policy=SchedulingPolicy(options["scheduling_policy"]),
        seed=options["seed"],
        record_steps=options["record_steps"],
        replay_steps=options["replay_steps"],
    )
    settings = ServerSettings(
        host=options["host"],
        port=options["port"],
        admin_host=options["admin_host"],
        admin_port=options["admin_port"],
        policies=options["policies"],
        push=push_settings(options),
        allow_unconfigured=options["allow_unconfigured"],
        anonymous=options["anonymous"],
        served_model_names=options["served_model_name"],
        api_key=options["api_key"],
        ssl_certfile=options["ssl_certfile"],
        ssl_keyfile=options["ssl_keyfile"],
        max_request_bytes=options["max_request_bytes"],
        max_tenant_body_bytes=options["max_tenant_body_bytes"],
        drain_timeout=options["drain_timeout"],
        write_timeout=options["write_timeout"],
        queue_heartbeat=options["queue_heartbeat"],
    )
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        try:
            code = runner.run(serve_until_stopped(settings, config, _announce))
        except StartupError as error:
            click.echo(f"evenhand: {error}", err=True)
            code = 1
    sys.exit(code)


def push_settings(options: dict[str, Any]) -> "PushSettings | None":
    """Raises UsageError where the options contradict each other."""
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


def _announce(running: "Running") -> None:
    name = running.service.model_names[0]
    click.echo(
        f"\nEvenhand serves {name} at {running.url}/v1\n\n"
        f"  curl {running.url}/v1/chat/completions -H 'Content-Type: application/json' \\\n"
        f'    -d \'{{"messages": [{{"role": "user", "content": "What is the capital of France?"}}], "temperature": 0}}\'\n',
        err=True,
    )
