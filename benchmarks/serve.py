"""Output tokens per second with 1, 8 and 32 requests in flight, time to first token, time per token and start-up.

`bandwidth_fraction` is what reading weights, keys and values once for each token takes at the best rate that this machine reads
memory at in those minutes, over the time between two tokens of one stream; `matmul_fraction` what the prompt's arithmetic takes at
the best rate of the instruction in use, over the time to the first token. At least 0.7 and 0.75 are asked for.

Closed loops of requests over HTTP: prompts of random tokens, no two alike, and a fixed number of output tokens. A peer
that is installed takes the same loops by turns with Evenhand, so that both meet the same state of the machine:
`--peer llama.cpp --peer-model FILE.gguf`, with as many files as it is to be measured with, or `--peer vllm` with the same model directory or hub id as ours. What of it fails is
told, under `failures` too, and left out.
"""

import asyncio
import contextlib
import os
import random
import shutil
import signal
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common
import httpx2
import openai
from machine_limits import Machine
from peers import LLAMA_CPP_RETRIES
from serve_limits import fractions
from serving import MODEL, await_port, free_port, serve

LOADS = (1, 8, 32)
REQUESTS_PER_PLACE = 2  # in flight
MIN_REQUESTS = 6
NUM_PROMPT_TOKENS, NUM_OUTPUT_TOKENS = 256, 64
HIGHEST_TOKEN = 40_000
PEERS = ("llama.cpp", "vllm")
FAILURES = (openai.APIError, httpx2.TransportError)  # of a server that refuses, breaks off or is gone


@dataclass(frozen=True)
class Contender:
    """A running server."""

    name: str
    base_url: str
    startup_seconds: float
    max_retries: int = 0

    def client(self) -> openai.AsyncOpenAI:
        """With connections of its own: a server may close those that were idle while another was measured."""
        return openai.AsyncOpenAI(base_url=self.base_url, api_key="none", max_retries=self.max_retries, timeout=3600)


@dataclass(frozen=True)
class Answer:
    """Of one streamed request: seconds to its first token, seconds between tokens, number of tokens."""

    first: float
    gap: float
    num_tokens: int


def main() -> None:
    parser = common.arguments(__doc__)
    parser.add_argument("--model", help="a Hugging Face directory, hub id or GGUF file; default: the default model")
    parser.add_argument("--flags", default="", help="more flags for `evenhand serve`, in one argument")
    parser.add_argument("--peer", choices=PEERS)
    parser.add_argument(
        "--peer-model", action="append", help="what the peer serves; default: the same; may be repeated"
    )
    parser.add_argument("--peer-flags", default="", help="more flags for the peer, in one argument")
    options = parser.parse_args()
    loads = LOADS[:2] if options.quick else LOADS
    model = [options.model] if options.model else []
    flags = options.flags.split()
    machine = Machine()
    with contextlib.ExitStack() as stack:
        contenders = [stack.enter_context(_evenhand([*model, *flags]))]
        if options.peer:
            peer_models = options.peer_model or model
            if not peer_models:
                parser.error("--peer-model is needed: the peer has no default model")
            for peer_model in peer_models:
                contenders.append(stack.enter_context(_peer(options.peer, peer_model, options.peer_flags.split())))
        results = asyncio.run(_measure(contenders, machine, loads, options.seed, 1 if options.quick else 2))
    common.print_table(
        f"{NUM_PROMPT_TOKENS} tokens in, {NUM_OUTPUT_TOKENS} out",
        ["", *(f"{load} in flight, tokens/s" for load in loads), "TTFT p50, s", "TPOT p50, ms", "start, s"],
        [
            [
                name,
                *(_shown(result["output_tokens_per_s"][str(load)], 1) for load in loads),
                _shown(result["ttft_p50_s"], 2),
                _shown(result["tpot_p50_ms"], 1),
                _shown(result["startup_s"], 1),
            ]
            for name, result in results.items()
        ],
    )
    for failure in (failure for result in results.values() for failure in result["failures"]):
        common.console.print(failure)
    ours = results.pop("evenhand")
    del ours["failures"]
    seconds = ours["ttft_p50_s"], ours["tpot_p50_ms"] / 1e3
    ours |= fractions(machine.limits, options.model, flags, NUM_PROMPT_TOKENS, NUM_OUTPUT_TOKENS, *seconds)
    common.console.print(
        f"one stream: {ours['bandwidth_fraction']:.2f} of {ours['bandwidth_gb_per_s']:.1f} GB/s between tokens, "
        f"{ours['matmul_fraction']:.2f} of {ours['matmul_gflop_per_s']:.0f} GFLOP/s in the prompt"
    )
    common.finish("serve", ours | ({"peers": results} if results else {}))


def _shown(number: float | None, digits: int) -> str:
    return "-" if number is None else f"{number:.{digits}f}"


@contextlib.contextmanager
def _evenhand(flags: Sequence[str]) -> Iterator[Contender]:
    started_at = time.monotonic()
    with serve("--no-enable-prefix-caching", *flags) as server:
        yield Contender("evenhand", f"{server.url}/v1", time.monotonic() - started_at)


@contextlib.contextmanager
def _peer(name: str, model: str, flags: Sequence[str]) -> Iterator[Contender]:
    """The peer's own OpenAI-compatible server, with as many slots as the largest load."""
    program = {"llama.cpp": "llama-server", "vllm": "vllm"}[name]
    path = shutil.which(program)
    if path is None:
        raise SystemExit(f"{program} is not on PATH: install {name}, or leave --peer out")
    port, slots = free_port(), max(LOADS)
    address = ["--host", "127.0.0.1", "--port", str(port)]
    if name == "llama.cpp":
        context = slots * (NUM_PROMPT_TOKENS + NUM_OUTPUT_TOKENS + 64)
        command = [path, "-m", model, *address, "--parallel", str(slots), "-c", str(context), "--alias", MODEL]
    else:
        command = [path, "serve", model, *address, "--served-model-name", MODEL, "--no-enable-prefix-caching"]
    started_at = time.monotonic()
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            [*command, *flags], stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True
        )
        try:
            await_port(process, port, log, "/health")
            seconds = time.monotonic() - started_at
            retries = LLAMA_CPP_RETRIES if name == "llama.cpp" else 0
            yield Contender(f"{name}, {Path(model).name}", f"http://127.0.0.1:{port}/v1", seconds, retries)
        finally:
            with contextlib.suppress(ProcessLookupError):  # it ended by itself, of which the error tells
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


async def _measure(
    contenders: Sequence[Contender], machine: Machine, loads: Sequence[int], seed: int, rounds: int
) -> dict[str, dict[str, Any]]:
    """Each load by each contender, by turns, `rounds` times; the median of the rounds' rates. The machine is measured beside
    each loop of one stream. Of a peer's loop that fails nothing counts, and None is what no loop told."""
    generator = random.Random(seed)
    rates: dict[tuple[str, int], list[float]] = {}
    alone: dict[str, list[Answer]] = {contender.name: [] for contender in contenders}
    failures: dict[str, list[str]] = {contender.name: [] for contender in contenders}
    for contender in contenders:
        await _loop(contender, generator, 1, 2)  # nothing is measured at first use
    for _ in range(rounds):
        for load in loads:
            for contender in contenders:
                if load == 1:
                    machine.measure()
                num_requests = max(MIN_REQUESTS, REQUESTS_PER_PLACE * load)
                started_at = time.monotonic()
                try:
                    answers = await _loop(contender, generator, load, num_requests)
                except FAILURES as error:
                    if contender is contenders[0]:
                        raise
                    failures[contender.name].append(f"{contender.name} failed at {load} in flight: {error!r}")
                    continue
                seconds = time.monotonic() - started_at
                rate = sum(answer.num_tokens for answer in answers) / seconds
                rates.setdefault((contender.name, load), []).append(rate)
                if load == 1:
                    alone[contender.name] += answers
    return {
        contender.name: {
            "output_tokens_per_s": {str(load): _median(rates.get((contender.name, load), [])) for load in loads},
            "ttft_p50_s": _median([answer.first for answer in alone[contender.name]]),
            "tpot_p50_ms": _median([1e3 * answer.gap for answer in alone[contender.name]]),
            "startup_s": contender.startup_seconds,
            "failures": failures[contender.name],
        }
        for contender in contenders
    }


def _median(numbers: Sequence[float]) -> float | None:
    return statistics.median(numbers) if numbers else None


async def _loop(contender: Contender, generator: random.Random, in_flight: int, num_requests: int) -> list[Answer]:
    """So many requests, as many of them at a time as may be in flight. Raises what the first that failed did, once all have ended."""
    prompts = [[generator.randrange(100, HIGHEST_TOKEN) for _ in range(NUM_PROMPT_TOKENS)] for _ in range(num_requests)]
    answers: list[Answer] = []

    async with contender.client() as client:

        async def place() -> None:
            while prompts:
                answers.append(await _ask(client, prompts.pop()))

        ended = await asyncio.gather(*(place() for _ in range(in_flight)), return_exceptions=True)
    for error in ended:
        if error is not None:
            raise error
    return answers


async def _ask(client: openai.AsyncOpenAI, prompt: list[int]) -> Answer:
    sent_at = time.monotonic()
    chunks = await client.completions.create(
        model=MODEL,
        prompt=prompt,
        max_tokens=NUM_OUTPUT_TOKENS,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"ignore_eos": True},
    )
    first_at = last_at = None
    num_tokens = 0
    async for chunk in chunks:
        if chunk.usage:
            num_tokens = chunk.usage.completion_tokens
        if chunk.choices and chunk.choices[0].text:
            last_at = time.monotonic()
            first_at = first_at or last_at
    assert first_at is not None and last_at is not None and num_tokens > 1, "the server answered without text"
    return Answer(first_at - sent_at, (last_at - first_at) / (num_tokens - 1), num_tokens)


if __name__ == "__main__":
    main()
