"""Tenants that always have more work in an engine than it does at once."""

import asyncio
import contextlib
import random
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import openai

from harness.installation import MODEL, Engine
from harness.stage import until

PROMPT_TOKENS = 48
_TOKEN_IDS = range(1000, 40_000)


@contextlib.contextmanager
def flood(engines: Sequence[Engine], keys: Sequence[str], in_flight: int) -> Iterator[None]:
    """While entered, each key's tenant has `in_flight` requests at each engine: new prompts, one output token each.

    Raises, when left, whatever a request was refused with.
    """
    stop = threading.Event()
    with ThreadPoolExecutor(1) as thread:
        running = thread.submit(asyncio.run, _ask_until(stop, engines, keys, in_flight))
        try:
            yield
        finally:
            stop.set()
        running.result()


async def _ask_until(stop: threading.Event, engines: Sequence[Engine], keys: Sequence[str], in_flight: int) -> None:
    async with contextlib.AsyncExitStack() as stack, asyncio.TaskGroup() as tasks:
        asking = []
        for engine in engines:
            for key in keys:
                client = openai.AsyncOpenAI(base_url=engine.url, api_key=key, max_retries=0, timeout=120)
                await stack.enter_async_context(client)
                asking += [tasks.create_task(_keep_asking(client)) for _ in range(in_flight)]
        await asyncio.to_thread(stop.wait)
        for each in asking:
            each.cancel()  # the engine drops what its client no longer waits for


async def _keep_asking(client: openai.AsyncOpenAI) -> None:
    while True:
        await client.completions.create(
            model=MODEL, prompt=random.sample(_TOKEN_IDS, PROMPT_TOKENS), max_tokens=1, temperature=0
        )


def wait_until_backlogged(engines: Sequence[Engine], *tenants: str, waiting: int = 1) -> None:
    """Returns once each tenant has so many requests waiting in each engine."""
    until(
        lambda: all(
            rows[tenant]["waiting"] >= waiting
            for rows in (engine.tenants() for engine in engines)
            for tenant in tenants
        )
    )
