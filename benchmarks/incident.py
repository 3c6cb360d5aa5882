"""The incident: a chat tenant alone, then beside a batch flood, under static, fcfs and fair scheduling.

Every 1.5 s the chat tenant (weight 4, Interactive, inter-token SLO 100 ms) streams a 32-token prompt with 16 output
tokens, while the batch tenant (weight 1, Batch) keeps 16 requests in flight, each a different prompt of 2,000 tokens
with 32 output tokens. Real server, real model, official client; times are the client's. An unfinished request counts
with the time that it has waited.

Throughput is compared twice: with fcfs given exactly the token budgets that fair used, step by step (what fairness
costs), and with fcfs at the budget that is best for it on this processor (what the inter-token SLO costs). Both sides
must serve the same chat for that, so measuring begins when fcfs has worked off the flood's first prompts, all that the chat
had sent until then too, and fair runs as long before it is measured.
"""

import asyncio
import random
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import common
import openai
import serving

CHAT_KEY = "chat-tenant-key-of-the-benchmark"
BATCH_KEY = "batch-tenant-key-of-the-benchmark"
POLICIES = f"""\
apiVersion: evenhand.dev/v1alpha1
kind: TenantPolicy
metadata: {{name: chat}}
spec:
  weight: 4
  latencyClass: Interactive
  slo: {{interTokenLatency: 100ms}}
  identities: [{{name: keys, type: APIKey, apiKey: {{secretRef: {{name: chat-keys}}}}}}]
---
apiVersion: evenhand.dev/v1alpha1
kind: TenantPolicy
metadata: {{name: batch}}
spec:
  weight: 1
  latencyClass: Batch
  identities: [{{name: keys, type: APIKey, apiKey: {{secretRef: {{name: batch-keys}}}}}}]
---
apiVersion: v1
kind: Secret
metadata: {{name: chat-keys}}
stringData: {{key: {CHAT_KEY}}}
---
apiVersion: v1
kind: Secret
metadata: {{name: batch-keys}}
stringData: {{key: {BATCH_KEY}}}
"""
NUM_BATCH_REQUESTS = 16
BUDGETS = (64, 256, 512)
MAX_SETTLE_SECONDS = 300.0
SETTLED_AFTER = 4  # chat requests; the first come before the whole flood is there
REPLAY_MARGIN = 1.1  # replayed, fcfs has smaller steps than its best, and may need longer to settle
SWEEP_SECONDS = 10.0


@dataclass(frozen=True)
class Traffic:
    """What the two tenants send: tokens of prompts and outputs, and the seconds between two requests of the chat."""

    chat_interval: float = 1.5
    chat_prompt: int = 32
    chat_output: int = 16
    batch_prompt: int = 2000
    batch_output: int = 32


@dataclass
class Outcome:
    """One run. `chat` holds a (seconds since measuring began, TTFT, has a token) for each chat request.

    `settle_s`: how long the run went before it was measured.
    """

    settle_s: float
    chat: list[tuple[float, float, bool]]
    chat_itl_s: list[float]
    batch_tokens_per_s: float
    tokens_per_s: float

    def results(self) -> dict[str, float | None]:
        """Figures under the names that pipelines read; None where no chat request got two tokens."""
        times = [ttft for _, ttft, _ in self.chat]
        return {
            "chat_ttft_p50_s": serving.percentile(times, 50),
            "chat_ttft_p95_s": serving.percentile(times, 95),
            "chat_itl_p99_s": serving.percentile(self.chat_itl_s, 99) if self.chat_itl_s else None,
            "batch_tokens_per_s": self.batch_tokens_per_s,
            "tokens_per_s": self.tokens_per_s,
        }


class Incident:
    """Runs the two tenants against one server after another."""

    def __init__(self, seed: int, directory: Path, traffic: Traffic = Traffic()) -> None:
        self._random = random.Random(seed)
        self._traffic = traffic
        self._policies = directory / "policies"
        self._policies.mkdir()
        (self._policies / "policies.yaml").write_text(POLICIES)

    def run(
        self, policy: str, *flags: str, seconds: float, settle: float | None, chat: bool = True, flood: bool = True
    ) -> Outcome:
        """Serve under the scheduling policy, load the server, and measure for `seconds` after `settle` seconds.

        `settle` None: until the chat is served as it comes, see `_until_steady`.
        """
        with serving.serve("--policies", str(self._policies), "--scheduling-policy", policy, *flags) as server:
            return asyncio.run(self._load(server, seconds, settle, chat=chat, flood=flood))

    async def _load(
        self, server: serving.Server, seconds: float, settle: float | None, *, chat: bool, flood: bool
    ) -> Outcome:
        chat_client, batch_client = server.client(CHAT_KEY), server.client(BATCH_KEY)
        async with chat_client, batch_client:
            await serving.stream(chat_client, serving.Timing(0.0), self._prompt(32), 4)  # a client's first is slow
            tasks = [asyncio.create_task(self._flood(batch_client)) for _ in range(NUM_BATCH_REQUESTS * flood)]
            timings: list[serving.Timing] = []
            if chat:
                tasks.append(asyncio.create_task(self._chat(chat_client, timings)))
            loaded_at = time.monotonic()
            if settle is None:
                await self._until_steady(timings)
            else:
                await asyncio.sleep(settle)
            started_at, before = time.monotonic(), [await self._tokens(server, tenant) for tenant in ("batch", "chat")]
            await asyncio.sleep(seconds)
            now, after = time.monotonic(), [await self._tokens(server, tenant) for tenant in ("batch", "chat")]
            await serving.cancel(tasks)
        measured = [timing for timing in timings if timing.sent_at >= started_at]
        return Outcome(
            started_at - loaded_at,
            [(t.sent_at - started_at, t.time_to_first_token(now), bool(t.token_times)) for t in measured],
            [gap for timing in measured for gap in timing.gaps(now)],
            (after[0] - before[0]) / (now - started_at),
            (sum(after) - sum(before)) / (now - started_at),
        )

    async def _until_steady(self, timings: list[serving.Timing]) -> None:
        """Until a chat request behind the whole flood is answered, and then the last one that had been sent by then.

        What the chat had piled up is worked off in between, which would count as more tokens than it sends.
        """
        await self._until_answered(timings)
        last = timings[-1]
        await self._until(lambda: bool(last.token_times))

    async def _until_answered(self, timings: list[serving.Timing]) -> None:
        await self._until(lambda: any(timing.token_times for timing in timings[SETTLED_AFTER:]))

    async def _until(self, holds: Callable[[], bool]) -> None:
        deadline = time.monotonic() + MAX_SETTLE_SECONDS
        while time.monotonic() < deadline and not holds():
            await asyncio.sleep(self._traffic.chat_interval)

    async def _chat(self, client: openai.AsyncOpenAI, timings: list[serving.Timing]) -> None:
        """An open loop: a request every interval, whatever became of the ones before."""
        async with asyncio.TaskGroup() as group:
            while True:
                timing = serving.Timing(time.monotonic())
                timings.append(timing)
                prompt = self._prompt(self._traffic.chat_prompt)
                group.create_task(serving.stream(client, timing, prompt, self._traffic.chat_output))
                await asyncio.sleep(max(0.0, timing.sent_at + self._traffic.chat_interval - time.monotonic()))

    async def _flood(self, client: openai.AsyncOpenAI) -> None:
        """A closed loop of one: the next prompt when the last answer is complete."""
        while True:
            prompt = self._prompt(self._traffic.batch_prompt)
            await serving.stream(client, serving.Timing(0.0), prompt, self._traffic.batch_output)

    async def _tokens(self, server: serving.Server, tenant_id: str) -> int:
        tenant = await server.tenant(tenant_id)
        return int(tenant.get("promptTokens", 0)) + int(tenant.get("generationTokens", 0))

    def _prompt(self, num_tokens: int) -> list[int]:
        return [self._random.randrange(1000, 40000) for _ in range(num_tokens)]


def main() -> None:
    parser = common.arguments(__doc__)
    parser.add_argument("--demo", action="store_true", help="four short runs and a plot, incident.png")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        incident = Incident(options.seed, Path(directory))
        if options.demo:
            demo(incident)
        elif options.quick:
            benchmark(incident, Path(directory), seconds=6.0, settle=3.0, sweep=3.0)
        else:
            benchmark(incident, Path(directory), seconds=45.0, settle=None, sweep=SWEEP_SECONDS)


def demo(incident: Incident) -> None:
    outcomes = {"alone": incident.run("fair", seconds=15.0, settle=0.0, flood=False)}
    for policy in ("static", "fcfs", "fair"):
        common.console.print(f"{policy}: a chat tenant beside a batch flood, 40 s")
        outcomes[policy] = incident.run(policy, seconds=40.0, settle=0.0)
    show(outcomes)
    plot(outcomes, Path("incident.png"))
    common.console.print("The chat tenant's time to first token over time: incident.png")


def benchmark(incident: Incident, directory: Path, *, seconds: float, settle: float | None, sweep: float) -> None:
    throughput = {
        budget: incident.run(
            "fcfs", "--max-num-batched-tokens", str(budget), seconds=sweep, settle=sweep / 3, chat=False
        ).batch_tokens_per_s
        for budget in BUDGETS
    }
    rows = [[str(budget), f"{rate:.0f}"] for budget, rate in throughput.items()]
    common.print_table("This processor's throughput under a flood alone", ["tokens per step", "tokens/s"], rows)

    steps = directory / "steps.csv"
    best_budget = max(throughput, key=lambda budget: throughput[budget])
    outcomes = {
        "alone": incident.run("fair", seconds=seconds / 2, settle=0.0, flood=False),
        "static": incident.run("static", seconds=seconds, settle=0.0),
        "fcfs": incident.run("fcfs", "--max-num-batched-tokens", str(best_budget), seconds=seconds, settle=settle),
    }
    settle = outcomes["fcfs"].settle_s * REPLAY_MARGIN
    outcomes["fair"] = incident.run("fair", "--record-steps", str(steps), seconds=seconds, settle=settle)
    outcomes["fcfs_replayed"] = incident.run("fcfs", "--replay-steps", str(steps), seconds=seconds, settle=settle)
    show(outcomes)
    fair = outcomes["fair"].batch_tokens_per_s
    results: dict[str, object] = {name: outcome.results() for name, outcome in outcomes.items()}
    results["fair_over_fcfs_replayed"] = fair / outcomes["fcfs_replayed"].batch_tokens_per_s
    results["fair_over_fcfs_best_budget"] = fair / outcomes["fcfs"].batch_tokens_per_s
    total = outcomes["fair"].tokens_per_s
    results["fair_over_fcfs_replayed_all_tenants"] = total / outcomes["fcfs_replayed"].tokens_per_s
    results["fair_over_fcfs_best_budget_all_tenants"] = total / outcomes["fcfs"].tokens_per_s
    results["fcfs_settle_s"] = outcomes["fcfs"].settle_s
    results["fcfs_best_budget"] = best_budget
    results["flood_tokens_per_s_by_budget"] = throughput
    common.finish("incident", results)


def show(outcomes: dict[str, Outcome]) -> None:
    columns = ["scheduling policy", "chat TTFT p50 s", "p95 s", "chat ITL p99 s", "batch tokens/s", "all tokens/s"]
    rows = [
        [name, *("-" if value is None else f"{value:.3g}" for value in o.results().values())]
        for name, o in outcomes.items()
    ]
    common.print_table("A chat tenant beside a batch flood", columns, rows)


def plot(outcomes: dict[str, Outcome], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 4.5), layout="constrained")
    for color, (name, outcome) in zip(
        ("tab:gray", "tab:orange", "tab:red", "tab:green"), outcomes.items(), strict=True
    ):
        line = "--" if name == "static" else "-"
        axes.plot(*zip(*((x, y) for x, y, _ in outcome.chat), strict=True), color=color, linestyle=line, linewidth=1)
        answered = [(x, y) for x, y, has_token in outcome.chat if has_token]
        waiting = [(x, y) for x, y, has_token in outcome.chat if not has_token]
        label = "alone" if name == "alone" else f"beside a flood, {name}"
        axes.plot(*zip(*(answered or [(0, float("nan"))]), strict=True), "o", color=color, markersize=5, label=label)
        axes.plot(*zip(*(waiting or [(0, float("nan"))]), strict=True), "x", color=color, markersize=5)
    axes.plot([], [], "kx", label="still without a token at the end")
    axes.set(xlabel="seconds since the start", ylabel="chat time to first token, s", yscale="log")
    axes.set_title("A chat tenant's time to first token, alone and beside another tenant's batch flood")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
