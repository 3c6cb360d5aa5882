"""The load of `agreement.py`: the same requests of three backlogged tenants, sent to a server and to the simulator."""

import asyncio
import json
import random
import time
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import serving

from evenhand_engine.core.step_recorder import load_steps
from evenhand_engine.scheduler.step_time import StepShape
from evenhand_engine.simulator.device import Device
from evenhand_engine.simulator.measures import RequestRecord
from evenhand_engine.simulator.scenario import Scenario
from evenhand_engine.simulator.simulation import Run
from evenhand_engine.simulator.traces import TraceRequest
from evenhand_policy.files import load_policy_directory


@dataclass(frozen=True)
class Tenant:
    """A tenant's requests are alike, so that their order among themselves changes nothing."""

    name: str
    weight: int
    num_prompt_tokens: int
    num_output_tokens: int

    @property
    def key(self) -> str:
        return f"{self.name}-tenant-key-of-the-benchmark"


TENANTS = (Tenant("small", 1, 20, 48), Tenant("middle", 2, 24, 40), Tenant("large", 3, 18, 56))
PLUG = Tenant("plug", 1, 0, 1)  # its prompt is as long as the cache
NAMES = [tenant.name for tenant in TENANTS]
POLICY = """\
apiVersion: evenhand.dev/v1alpha1
kind: TenantPolicy
metadata: {{name: {name}}}
spec:
  weight: {weight}
  kvCache: {{guaranteedPercent: {guaranteed}}}
  identities: [{{name: keys, type: APIKey, apiKey: {{secretRef: {{name: {name}-keys}}}}}}]
---
apiVersion: v1
kind: Secret
metadata: {{name: {name}-keys}}
stringData: {{key: {key}}}
"""
SLOTS = 8
STEP_TOKENS = 64
BLOCK_SIZE = 16
PLUG_BEGUN_TOKENS = 1_024  # no other request has so much context, so its steps are known in the recording
WAIT_SECONDS = 120.0


class Loader:
    """Brings the three tenants' requests to a server so that the first step of any of them finds all of them."""

    def __init__(self, server: serving.Server, num_requests: int, token_ids: range, seed: int) -> None:
        """`num_requests` of each tenant, whose prompts are drawn from `token_ids`."""
        self._server = server
        self._token_ids = token_ids
        self._num_requests = num_requests
        self._random = random.Random(seed)
        with urllib.request.urlopen(f"{server.url}/v1/models", timeout=10) as answer:
            self.max_model_len = int(json.load(answer)["data"][0]["max_model_len"])

    async def serve(self) -> list[tuple[Tenant, serving.Timing]]:
        """Fill the cache, queue all requests, clear the cache; returns when all have ended."""
        timings: list[tuple[Tenant, serving.Timing]] = []

        def send(tenant: Tenant) -> None:
            timing = serving.Timing(time.monotonic())
            timings.append((tenant, timing))
            group.create_task(self._stream(tenant, timing))

        async with asyncio.TaskGroup() as group:
            longest = replace(PLUG, num_prompt_tokens=self.max_model_len - BLOCK_SIZE)
            plug = group.create_task(self._stream(longest, serving.Timing(0.0)))
            await self._until(PLUG.name, lambda state: state.get("promptTokens", 0) > PLUG_BEGUN_TOKENS)
            for tenant in TENANTS:  # one by one: who comes first breaks ties
                send(tenant)
                await self._until(tenant.name, lambda state: state.get("waiting") == 1)
            for tenant in TENANTS:
                for _ in range(self._num_requests - 1):
                    send(tenant)
            for tenant in TENANTS:
                await self._until(tenant.name, lambda state: state.get("waiting") == self._num_requests)
            if not plug.cancel():
                raise SystemExit("the cache was free again before all requests waited; this machine is too busy")
        return timings

    async def _stream(self, tenant: Tenant, timing: serving.Timing) -> None:
        prompt = self._random.choices(self._token_ids, k=tenant.num_prompt_tokens)
        async with self._server.client(tenant.key) as client:
            await serving.stream(client, timing, prompt, tenant.num_output_tokens)

    async def _until(self, tenant_id: str, holds: Callable[[dict[str, Any]], bool]) -> None:
        async with asyncio.timeout(WAIT_SECONDS):
            while not holds(await self._server.tenant(tenant_id)):
                await asyncio.sleep(0.01)


def run_real(
    directory: Path, num_requests: int, token_ids: range, flags: Sequence[str], seed: int
) -> tuple[list[RequestRecord], int]:
    """Records of the three tenants, in seconds from their first token on, and the model's context."""
    limits = ("--max-num-seqs", str(SLOTS), "--max-num-batched-tokens", str(STEP_TOKENS), "--no-enable-prefix-caching")
    record = ("--policies", str(directory), "--record-steps", str(directory / "steps.csv"))
    with serving.serve(*flags, *limits, *record) as server:
        loader = Loader(server, num_requests, token_ids, seed)
        timings = asyncio.run(loader.serve())
    start = min(timing.token_times[0] for _, timing in timings)
    return [_record(tenant, timing, start) for tenant, timing in timings], loader.max_model_len


def _record(tenant: Tenant, timing: serving.Timing, start: float) -> RequestRecord:
    """Tokens that came together, since they were held back, are spread over the time since those before."""
    lengths = tenant.num_prompt_tokens, tenant.num_output_tokens
    times = np.interp(np.arange(1, tenant.num_output_tokens + 1), timing.token_counts, timing.token_times) - start
    return RequestRecord(tenant.name, 0.0, *lengths, float(times[0]), float(times[-1]), times)


def run_simulated(directory: Path, num_requests: int, context: int, device: Device) -> Run:
    """The same requests, all there at time 0."""
    trace = [
        TraceRequest(tenant.name, 0.0, tenant.num_prompt_tokens, tenant.num_output_tokens)
        for tenant in TENANTS
        for _ in range(num_requests)
    ]
    scenario = Scenario.of_trace(trace, device, load_policy_directory(directory))
    settings = scenario.with_settings(max_model_len=context, num_kv_blocks=context // BLOCK_SIZE)
    return settings.with_settings(enable_prefix_caching=False).run("fair")


def steps_after_plug(path: Path) -> tuple[list[StepShape], list[float]]:
    """The recorded steps from the first one without the plug on."""
    shapes, seconds = load_steps(path)
    first = 1 + max(i for i, shape in enumerate(shapes) if shape.prefill_context >= PLUG_BEGUN_TOKENS)
    return shapes[first:], seconds[first:]
