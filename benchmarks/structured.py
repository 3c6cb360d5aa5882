"""What structured output and log probabilities cost: output tokens per second of a real server with 8 requests in flight.

The same number of tokens, three ways in turn, several rounds: free text, a JSON schema whose array is never full, and free text with
log probabilities. The figure is the median over the rounds of the loss against the free text of the same round; beside it, since
a machine that does other work too tells little by the clock, the same of the seconds of CPU of the server's processes. The client
reads answers and does not look into them before the clock has stopped.
"""

import asyncio
import json
import statistics
import time
from typing import Any, NamedTuple

import aiohttp
import common
import psutil
import serving

NUM_IN_FLIGHT = 8
SCHEMA = {
    "type": "array",
    "minItems": 1000,
    "items": {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 24},
            "age": {"type": "integer", "minimum": 0, "maximum": 130},
            "tags": {"type": "array", "items": {"enum": ["a", "b", "c"]}, "maxItems": 3},
        },
        "required": ["name", "age", "tags"],
        "additionalProperties": False,
    },
}
Ways = dict[str, dict[str, Any]]
FREE = "free text"
WAYS: Ways = {
    FREE: {},
    "JSON schema": {"structured_outputs": {"json": SCHEMA}},
    "log probabilities": {"logprobs": True, "top_logprobs": 5},
}
MOST_LOST = 0.05


class Answers(NamedTuple):
    """What one round of answers took: seconds, and seconds of CPU of the server's processes."""

    num_tokens: int
    seconds: float
    core_seconds: float
    http_seconds: float


async def _ask_all(server: serving.Server, fields: dict[str, Any], max_tokens: int) -> Answers:
    http = psutil.Process(server.pid)
    core = max(http.children(), key=lambda child: child.memory_info().rss)  # which has the model
    url = f"{server.url}/v1/chat/completions"
    async with aiohttp.ClientSession() as session:

        async def ask(number: int) -> bytes:
            body = {
                "messages": [{"role": "user", "content": f"List people, number {number}."}],
                "max_tokens": max_tokens,
                "seed": number,
                "ignore_eos": True,
                **fields,
            }
            async with session.post(url, json=body) as response:
                response.raise_for_status()
                return await response.read()

        before = _cpu_seconds(core), _cpu_seconds(http)
        started_at = time.perf_counter()
        answers = await asyncio.gather(*map(ask, range(NUM_IN_FLIGHT)))
        seconds = time.perf_counter() - started_at
    core_seconds, http_seconds = _cpu_seconds(core) - before[0], _cpu_seconds(http) - before[1]
    num_tokens = sum(json.loads(answer)["usage"]["completion_tokens"] for answer in answers)
    return Answers(num_tokens, seconds, core_seconds, http_seconds)


def _cpu_seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


async def _measure(server: serving.Server, ways: Ways, num_rounds: int, max_tokens: int) -> dict[str, list[Answers]]:
    for fields in ways.values():
        await _ask_all(server, fields, 8)  # compiles, and warms the prefix cache
    found: dict[str, list[Answers]] = {way: [] for way in ways}
    for number in range(num_rounds):
        for way in sorted(ways, reverse=number % 2 == 1):  # each as often before the others as behind them
            found[way].append(await _ask_all(server, ways[way], max_tokens))
    return found


def main() -> None:
    parser = common.arguments(__doc__)
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    args = parser.parse_args()
    num_rounds, max_tokens = (2, 32) if args.quick else (15, 192)
    ways = {way: fields for way, fields in WAYS.items() if way in args.ways or way == FREE}
    with serving.serve() as server:
        found = asyncio.run(_measure(server, ways, num_rounds, max_tokens))
    results = {}
    for way, rounds in found.items():
        pairs = list(zip(rounds, found[FREE], strict=True))
        results[way] = {
            "tokens_per_second": statistics.median(each.num_tokens / each.seconds for each in rounds),
            "lost": statistics.median(1 - free.seconds / each.seconds for each, free in pairs),
            "core_cpu_ms_per_token": statistics.median(1e3 * each.core_seconds / each.num_tokens for each in rounds),
            "http_cpu_ms_per_token": statistics.median(1e3 * each.http_seconds / each.num_tokens for each in rounds),
            "more_cpu": statistics.median(
                (each.core_seconds + each.http_seconds) / (free.core_seconds + free.http_seconds) - 1
                for each, free in pairs
            ),
        }
    headings = ["output", "tokens/s", "lost", "core CPU ms/token", "HTTP CPU ms/token", "more CPU"]
    formats = ("{:.1f}", "{:+.1%}", "{:.2f}", "{:.3f}", "{:+.1%}")
    rows = [
        [way, *(form.format(value) for form, value in zip(formats, result.values(), strict=True))]
        for way, result in results.items()
    ]
    common.print_table(f"{NUM_IN_FLIGHT} in flight, {max_tokens} tokens each", headings, rows)
    held = max(result["lost"] for result in results.values()) <= MOST_LOST
    common.finish("structured", {"ways": results, "held": held})


if __name__ == "__main__":
    main()
