"""Guessed tokens at one stream: what they gain where text repeats, and what they cost where it does not.

The default model, one stream at a time, with and without drafts by turns on the same prompts, so that both meet the same
machine. Repeating: the model goes on with a file that says the same thrice, as answers do that quote or edit; plain: it tells
a story, drawn with a temperature, each time with another seed.
"""

import statistics
import time
from dataclasses import replace

import common

from evenhand_engine.config import EngineConfig
from evenhand_engine.core.loading import LoadedModel, load_model
from evenhand_engine.model.source import resolve_model_dir
from evenhand_engine.scheduler.request import Request, SamplingParams
from evenhand_engine.scheduler.scheduler import Scheduler
from evenhand_engine.text.tokenizer import Tokenizer
from evenhand_policy.config import SchedulerConfig

SOURCE = """def mean(values):
    total = 0.0
    for value in values:
        total += value
    return total / len(values)


def variance(values):
    center = mean(values)
    total = 0.0
    for value in values:
        total += (value - center) ** 2
    return total / len(values)
"""
REPEATING = SOURCE * 3
CHAT = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
PLAIN = CHAT.format("Tell me a long story about a lighthouse keeper who finds a letter in a bottle.")
NUM_DRAFTS = 8


class Side:
    """The default model with or without drafts: one scheduler, which goes on learning what its steps take."""

    def __init__(self, model: LoadedModel, num_drafts: int) -> None:
        settings = replace(model.settings, num_speculative_tokens=num_drafts, enable_prefix_caching=False)
        self._runner = model.runner
        self._scheduler = Scheduler(settings, SchedulerConfig())
        self._num_requests = 0

    @property
    def acceptance(self) -> float:
        """Of all drafts so far, the part that was right."""
        speculation = self._scheduler.speculation
        return speculation.num_accepted_tokens / max(1, speculation.num_draft_tokens)

    def output_seconds(self, prompt: list[int], params: SamplingParams) -> float:
        """Seconds from the first output to the last of one request alone."""
        self._num_requests += 1
        request = Request(f"r{self._num_requests}", "t", prompt, params, time.monotonic())
        self._scheduler.add(request, time.monotonic())
        first = 0.0
        while request.finish_reason is None:
            batch = self._scheduler.step(time.monotonic())
            assert batch is not None
            self._runner.submit(batch)
            self._scheduler.update(self._runner.collect(), time.monotonic())
            if not first and request.num_output_tokens:
                first = time.monotonic()
        return time.monotonic() - first


def main() -> None:
    options = common.arguments(__doc__).parse_args()
    num_rounds, num_outputs = (2, 48) if options.quick else (8, 160)
    model = load_model(EngineConfig(max_model_len=1024))
    tokenizer = Tokenizer(resolve_model_dir(None))
    sides = {"without": Side(model, 0), "with": Side(model, NUM_DRAFTS)}
    results: dict[str, float] = {}
    rows = []
    for kind, text, temperature in (("repeating", REPEATING, 0.0), ("plain", PLAIN, 0.8)):
        prompt = tokenizer.encode(text)
        rates: dict[str, list[float]] = {name: [] for name in sides}
        for number in range(num_rounds):
            params = SamplingParams(max_tokens=num_outputs, temperature=temperature, seed=options.seed + number)
            for name in sorted(sides, reverse=number % 2 == 1):
                rates[name].append((num_outputs - 1) / sides[name].output_seconds(prompt, params))
        medians = {name: statistics.median(values) for name, values in rates.items()}
        ratio = statistics.median(a / b for a, b in zip(rates["with"], rates["without"], strict=True))
        results[f"{kind}_ratio"] = round(ratio, 3)
        rows.append([kind, f"{medians['without']:.1f}", f"{medians['with']:.1f}", f"{ratio:.2f}"])
    results["acceptance"] = round(sides["with"].acceptance, 3)
    common.print_table("One stream, output tokens per second", ["text", "without drafts", "with", "ratio"], rows)
    common.finish("speculation", results)


if __name__ == "__main__":
    main()
