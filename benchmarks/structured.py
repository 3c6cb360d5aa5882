"""What structured output and log probabilities cost: output tokens per second of a real server with 8 requests in flight.

The same number of tokens, three ways in turn, several rounds: free text, a JSON schema whose array is never full, and free text with
log probabilities. The figure is the median over the rounds of the loss against the free text of the same round.
"""

import asyncio
import statistics
import time
from typing import Any

import common
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
WAYS: dict[str, dict[str, Any]] = {
    "free text": {},
    "JSON schema": {"structured_outputs": {"json": SCHEMA}},
    "log probabilities": {"logprobs": True, "top_logprobs": 5},
}
MOST_LOST = 0.05


async def _tokens_per_second(server: serving.Server, fields: dict[str, Any], max_tokens: int) -> float:
    async with server.client("none") as client:

        async def ask(number: int) -> int:
            answer = await client.chat.completions.create(
                model=serving.MODEL,
                messages=[{"role": "user", "content": f"List people, number {number}."}],
                max_tokens=max_tokens,
                seed=number,
                extra_body={"ignore_eos": True, **fields},
            )
            assert answer.usage is not None
            return answer.usage.completion_tokens

        started_at = time.perf_counter()
        counts = await asyncio.gather(*map(ask, range(NUM_IN_FLIGHT)))
        return sum(counts) / (time.perf_counter() - started_at)


async def _measure(server: serving.Server, num_rounds: int, max_tokens: int) -> dict[str, list[float]]:
    for fields in WAYS.values():
        await _tokens_per_second(server, fields, 8)  # compiles, and warms the prefix cache
    found: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(num_rounds):
        for way, fields in WAYS.items():
            found[way].append(await _tokens_per_second(server, fields, max_tokens))
    return found


def main() -> None:
    args = common.arguments(__doc__).parse_args()
    num_rounds, max_tokens = (2, 32) if args.quick else (15, 192)
    with serving.serve() as server:
        found = asyncio.run(_measure(server, num_rounds, max_tokens))
    free = found["free text"]
    lost = {
        way: statistics.median(1 - speed / plain for speed, plain in zip(speeds, free, strict=True))
        for way, speeds in found.items()
    }
    rows = [[way, f"{statistics.median(found[way]):.1f}", f"{lost[way]:+.1%}"] for way in WAYS]
    common.print_table(f"{NUM_IN_FLIGHT} in flight, {max_tokens} tokens each", ["output", "tokens/s", "lost"], rows)
    common.finish("structured", {"tokens_per_second": found, "lost": lost, "held": max(lost.values()) <= MOST_LOST})


if __name__ == "__main__":
    main()
