"""The incident before an engine that is first come, first served: with and without a sidecar, by turns. See sidecar.py."""

import asyncio
import contextlib
import random
import re
import time
from dataclasses import dataclass, replace
from pathlib import Path

import aiohttp
import incident
import openai
import peers
import serving
import turns

SCALED = incident.Traffic(chat_prompt=16, chat_output=16, batch_prompt=640, batch_output=10)
ON_GPU = incident.Traffic(chat_interval=1.0, chat_prompt=200, chat_output=100, batch_prompt=8000, batch_output=16)
MAX_WAIT_SECONDS = 120.0  # for whoever asked while tokens were counted, and for an idle engine
PROMPT_SECONDS = 0.6  # that a prompt of the flood is to take before a peer: as on the preset of the H100
SMALLEST_PROMPT, LARGEST_PROMPT = 32, 640
CALIBRATION_SECONDS = 10.0
_BUSY = re.compile(r"^llamacpp:requests_(?:processing|deferred) (\d+)", re.MULTILINE)


@dataclass(frozen=True)
class Plan:
    """How long is measured: seconds of a slice, pairs of slices, and seconds in which the last of them begins."""

    seconds: float = 24.0
    num_pairs: int = 8
    max_seconds: float = 900.0


class SidecarIncident(incident.Incident):
    """Chat beside a flood, straight to an engine and through a sidecar before it, which both stay up."""

    def __init__(self, seed: int, directory: Path, traffic: incident.Traffic) -> None:
        super().__init__(seed, directory, traffic)
        self._turn_order = random.Random(seed)

    def before_ours(self, plan: Plan, *flags: str, is_paced: bool) -> list[tuple[turns.Slice, turns.Slice]]:
        """Pairs without and with a sidecar, before our engine; `is_paced`: at the pace of a GPU, see paced_engine.py."""
        ours = (
            serving.paced("h100-8b", 400_000, *self._flags, *flags) if is_paced else serving.serve(*self._flags, *flags)
        )
        with ours as engine, serving.sidecar(engine.url, "--policies", str(self._policies)) as server:
            return asyncio.run(self._compare(engine, server, plan))

    @property
    def _flags(self) -> tuple[str, ...]:
        return "--scheduling-policy", "fcfs", "--policies", str(self._policies)

    async def _compare(
        self, engine: serving.Server, server: serving.Server, plan: Plan
    ) -> list[tuple[turns.Slice, turns.Slice]]:
        async def without() -> turns.Slice:
            return await self._slice(engine, engine, plan.seconds)

        async def through() -> turns.Slice:
            return await self._slice(engine, server, plan.seconds)

        return await turns.by_turns(without, through, plan.num_pairs, plan.max_seconds, self._turn_order)

    async def _slice(self, engine: serving.Server, entrance: serving.Server, seconds: float) -> turns.Slice:
        """Both tenants' load at that entrance; tokens are the engine's own count."""
        timings: list[serving.Timing] = []
        async with entrance.client(incident.CHAT_KEY) as chat, entrance.client(incident.BATCH_KEY) as batch:
            await serving.stream(chat, serving.Timing(0.0), self._prompt(16), 4)  # a client's first is slow
            tasks = [asyncio.create_task(self._flood(batch)) for _ in range(incident.NUM_BATCH_REQUESTS)]
            tasks.append(asyncio.create_task(self._chat(chat, timings)))
            await self._until_answered(timings)
            before, started_at = await self._num_tokens(engine), time.monotonic()
            await asyncio.sleep(seconds)
            after, ended_at = await self._num_tokens(engine), time.monotonic()
            asked = [timing for timing in timings if started_at <= timing.sent_at < ended_at]
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(MAX_WAIT_SECONDS):
                    while not all(timing.token_times for timing in asked):
                        await asyncio.sleep(0.1)
            now = time.monotonic()
            await serving.cancel(tasks)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(MAX_WAIT_SECONDS):
                while await self._is_busy(engine):
                    await asyncio.sleep(0.1)
        waits = [timing.time_to_first_token(now) for timing in asked]
        return turns.Slice((after - before) / (ended_at - started_at), waits, sum(not t.token_times for t in asked))

    async def _num_tokens(self, engine: serving.Server) -> int:
        """Prompt and output tokens that the engine has computed, whoever asked."""
        names = ("promptTokens", "generationTokens")
        return sum(tenant.get(name, 0) for tenant in await engine.tenants() for name in names)

    async def _is_busy(self, engine: serving.Server) -> bool:
        return any(tenant["inFlight"] for tenant in await engine.tenants())


class PeerIncident(SidecarIncident):
    """The same with llama.cpp's server as the engine, whose counters say what it computed, and prompts as long as it is fast."""

    def before_peer(self, plan: Plan) -> list[tuple[turns.Slice, turns.Slice]]:
        with contextlib.ExitStack() as stack:
            engine = stack.enter_context(peers.llama_cpp())
            self._traffic = asyncio.run(self._scaled(engine))
            server = stack.enter_context(serving.sidecar(engine.url, "--policies", str(self._policies)))
            return asyncio.run(self._compare(engine, server, plan))

    @property
    def traffic(self) -> incident.Traffic:
        """As scaled to the machine."""
        return self._traffic

    async def _scaled(self, engine: serving.Server) -> incident.Traffic:
        """A prompt of the flood takes `PROMPT_SECONDS`, and a chat comes in twice that time."""
        async with engine.client(incident.BATCH_KEY) as client:
            await serving.stream(client, serving.Timing(0.0), self._prompt(SMALLEST_PROMPT), 2)  # its first is slow
            num_before, began = await self._num_tokens(engine), time.monotonic()
            while time.monotonic() - began < CALIBRATION_SECONDS:
                await self._prefill(client)
            rate = (await self._num_tokens(engine) - num_before) / (time.monotonic() - began)
        length = min(max(round(rate * PROMPT_SECONDS), SMALLEST_PROMPT), LARGEST_PROMPT)
        every = max(SCALED.chat_interval, 2 * length / rate)
        return replace(SCALED, batch_prompt=length, batch_output=4, chat_output=8, chat_interval=every)

    async def _prefill(self, client: openai.AsyncOpenAI) -> None:
        await serving.stream(client, serving.Timing(0.0), self._prompt(4 * SMALLEST_PROMPT), 1)

    async def _num_tokens(self, engine: serving.Server) -> int:
        return peers.num_tokens(await _metrics(engine))

    async def _is_busy(self, engine: serving.Server) -> bool:
        return any(map(int, _BUSY.findall(await _metrics(engine))))


async def _metrics(engine: serving.Server) -> str:
    async with aiohttp.ClientSession() as session, session.get(f"{engine.url}/metrics") as response:
        return await response.text()


def figures(pairs: list[tuple[turns.Slice, turns.Slice]]) -> dict[str, float]:
    """What is published of pairs without and with a sidecar."""
    found: dict[str, float] = {}
    for name, slices in (("_fcfs", [pair[0] for pair in pairs]), ("", [pair[1] for pair in pairs])):
        waits = [wait for one in slices for wait in one.waits]
        found |= {f"chat_p{p}{name}_s": serving.percentile(waits, p) for p in (50, 95)}
        found[f"chat_unanswered{name}"] = sum(one.num_unanswered for one in slices)
        found[f"num_chats{name}"] = len(waits)
        found[f"tokens_per_s{name}"] = sum(one.tokens_per_s for one in slices) / len(slices)
    ratio, low, high = turns.interval([through.tokens_per_s / alone.tokens_per_s for alone, through in pairs])
    return found | {
        "chat_p95_improvement": found["chat_p95_fcfs_s"] / found["chat_p95_s"],
        "tokens_ratio": ratio,
        "tokens_ratio_low": low,
        "tokens_ratio_high": high,
        "num_pairs": len(pairs),
    }
