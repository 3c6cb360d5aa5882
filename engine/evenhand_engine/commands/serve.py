"""`evenhand serve`: parses arguments and nothing else. What it needs is imported when it runs."""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from evenhand_engine.commands.options import quantity, server_options, server_settings

if TYPE_CHECKING:
    from evenhand_engine.server.startup import Running

_API_KEY_VARIABLE = "EVENHAND_API_KEY"
_DTYPES = ["auto", "float32", "bfloat16", "float16"]


@click.command()
@click.argument("model", required=False)
@click.option(
    "--api-server-count",
    type=click.IntRange(1, 64),
    default=1,
    help="Processes that read, tokenize and stream; 1: all in one.",
)
@click.option("--served-model-name", multiple=True, help="Name that clients ask for; may be repeated.")
@click.option("--dtype", type=click.Choice(_DTYPES), default="auto", help="Of the weights; auto: as they come.")
@click.option(
    "--kv-cache-dtype",
    type=click.Choice([*_DTYPES, "fp8"]),
    default="auto",
    help="auto: as the weights; float16 if quantised. fp8: e4m3, on a GPU.",
)
@click.option(
    "--activation-dtype",
    type=click.Choice(["auto", "float32", "bfloat16", "int8", "int16"]),
    default="auto",
    help="Of what linear layers multiply on the CPU; auto: bfloat16 if the processor does, or int16 beside codes.",
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
    "--kernels",
    type=click.Choice(["auto", "reference"]),
    default="auto",
    help="reference: plain torch on any device, to compare with.",
)
@click.option(
    "--tensor-parallel-size", type=click.IntRange(1), default=1, help="GPUs of this machine that share each layer."
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
@click.option(
    "--max-num-batched-tokens",
    type=quantity,
    help="Most tokens in one step; default: measured on the CPU, 2048 on a GPU.",
)
@click.option(
    "--target-step-ms",
    type=click.FloatRange(0),
    help="Longest step that prompts may make where no policy sets an objective, 0: any; default: by the device.",
)
@click.option("--kv-cache-memory-bytes", type=quantity, help="Memory of the KV cache; default: by the device.")
@click.option("--enable-prefix-caching/--no-enable-prefix-caching", default=True)
@click.option(
    "--speculative",
    type=click.Choice(["none", "ngram"]),
    default="none",
    help="ngram: guess tokens of text that repeats.",
)
@click.option("--num-speculative-tokens", type=quantity, default="8", help="Most guesses of a stream in one step.")
@click.option("--scheduling-policy", type=click.Choice(["fair", "fcfs", "static"]), default="fair")
@click.option("--record-steps", type=click.Path(path_type=Path), help="CSV file to write every step's time to.")
@click.option(
    "--replay-steps", type=click.Path(path_type=Path), help="Take step sizes from such a file, over and over."
)
@click.option("--seed", type=click.IntRange(0), default=0, help="Of dummy weights.")
@click.option("--api-key", envvar=_API_KEY_VARIABLE, help="Demand this key of requests that no policy's key proves.")
@click.option(
    "--queue-heartbeat",
    type=click.FloatRange(0, min_open=True),
    help="Seconds between comments in a stream whose request waits; default: none.",
)
@click.option(
    "--tool-call-parser",
    type=click.Choice(["auto", "none", "hermes", "llama3_json", "mistral", "mistral_args", "granite"]),
    default="auto",
    help="How the model writes tool calls; by default as its chat template says.",
)
@click.option(
    "--reasoning-parser", type=click.Choice(["deepseek_r1", "qwen3"]), help="Tell the model's reasoning apart."
)
@click.option(
    "--allowed-origins", multiple=True, help="Origin whose pages may read answers (CORS), or *; may be repeated."
)
@server_options(max_request_bytes="4M", max_tenant_body_bytes="64M")
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
    from evenhand_engine.logs import configure_logging
    from evenhand_engine.server.run import serve as serve_until_stopped

    configure_logging(options["log_level"])
    config = EngineConfig(
        model=model,
        device=options["device"],
        kernels=options["kernels"],
        tensor_parallel_size=options["tensor_parallel_size"],
        gpu_memory_utilization=options["gpu_memory_utilization"],
        load_format=options["load_format"],
        dtype=options["dtype"],
        kv_cache_dtype=options["kv_cache_dtype"],
        activation_dtype=options["activation_dtype"],
        quantization=options["quantization"],
        max_model_len=options["max_model_len"],
        max_num_seqs=options["max_num_seqs"],
        max_num_batched_tokens=options["max_num_batched_tokens"],
        target_step_ms=options["target_step_ms"],
        kv_cache_bytes=options["kv_cache_memory_bytes"],
        enable_prefix_caching=options["enable_prefix_caching"],
        scheduling_policy=SchedulingPolicy(options["scheduling_policy"]),
        speculative=options["speculative"],
        num_speculative_tokens=options["num_speculative_tokens"],
        seed=options["seed"],
        record_steps=options["record_steps"],
        replay_steps=options["replay_steps"],
    )
    settings = server_settings(
        options,
        api_server_count=options["api_server_count"],
        served_model_names=options["served_model_name"],
        api_key=options["api_key"],
        queue_heartbeat=options["queue_heartbeat"],
        allowed_origins=options["allowed_origins"],
        tool_call_parser=options["tool_call_parser"],
        reasoning_parser=options["reasoning_parser"],
    )
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        try:
            code = runner.run(serve_until_stopped(settings, config, _announce))
        except StartupError as error:
            click.echo(f"evenhand: {error}", err=True)
            code = 1
    sys.exit(code)


def _announce(running: "Running") -> None:
    name = running.service.model_names[0]
    click.echo(
        f"\nEvenhand serves {name} at {running.url}/v1\n\n"
        f"  curl {running.url}/v1/chat/completions -H 'Content-Type: application/json' \\\n"
        f'    -d \'{{"messages": [{{"role": "user", "content": "What is the capital of France?"}}], "temperature": 0}}\'\n',
        err=True,
    )
