"""What a foreign engine says of itself: vLLM's, SGLang's and llama.cpp's names for the same things. Pure."""

import re

import msgspec

from evenhand_engine.dispatch.gauges import Gauges

_WAITING = ("vllm:num_requests_waiting", "sglang:num_queue_reqs", "llamacpp:requests_deferred")
_KV_USAGE = (
    "vllm:kv_cache_usage_perc",
    "vllm:gpu_cache_usage_perc",
    "sglang:token_usage",
    "llamacpp:kv_cache_usage_ratio",
)
_PREEMPTIONS = ("vllm:num_preemptions_total", "sglang:num_retracted_reqs")
_GENERATED = ("vllm:generation_tokens_total", "sglang:generation_tokens_total", "llamacpp:tokens_predicted_total")
_KV_TOKENS = ("sglang:max_total_num_tokens",)  # not llamacpp:n_tokens_max, which is the longest context seen so far
_MOST = 2.0**53
_SAMPLE = re.compile(r"^([a-zA-Z_:][\w:]*)(?:\{([^}]*)\})?\s+(\S+)", re.MULTILINE)
_LABEL = re.compile(r'(\w+)="([^"]*)"')


def read_gauges(text: str) -> tuple[Gauges, int | None]:
    """Gauges, and the size of the KV cache in tokens; None where the text does not say. Several series of one name, such
    as those of data-parallel ranks, are added up, but for usage, which is their largest."""
    values: dict[str, list[float]] = {}
    kv_tokens = 0
    for name, labels, value in _SAMPLE.findall(text):
        try:
            number = float(value)
        except ValueError:
            continue
        if 0 <= number < _MOST:  # neither NaN nor infinite
            values.setdefault(name, []).append(number)
        if name == "vllm:cache_config_info":
            kv_tokens += _cache_size(dict(_LABEL.findall(labels)))

    def of(names: tuple[str, ...]) -> list[float] | None:
        return next((values[name] for name in names if name in values), None)

    waiting, usage, preemptions, generated = of(_WAITING), of(_KV_USAGE), of(_PREEMPTIONS), of(_GENERATED)
    size = of(_KV_TOKENS)
    gauges = Gauges(
        num_waiting=None if waiting is None else int(sum(waiting)),
        kv_usage=None if usage is None else max(usage),
        num_preemptions=None if preemptions is None else int(sum(preemptions)),
        num_tokens=None if generated is None else int(sum(generated)),
    )
    return gauges, kv_tokens or (None if size is None else int(sum(size)) or None)


def _cache_size(labels: dict[str, str]) -> int:
    blocks, block_size = labels.get("num_gpu_blocks", ""), labels.get("block_size", "")
    return min(int(blocks) * int(block_size), int(_MOST)) if blocks.isdecimal() and block_size.isdecimal() else 0


class Props(msgspec.Struct, frozen=True):
    """llama.cpp's `/props`, as far as it is of use.

    Attributes:
        total_slots: requests that it runs at once; later ones wait in its queue.
    """

    total_slots: int = 0


def backend_name(server: str, metrics: bytes) -> str:
    """What engine it is, by its `Server` header and its metrics: vllm, sglang, llama.cpp, evenhand or unknown."""
    if server in ("evenhand", "llama.cpp"):
        return server
    names = {b"vllm:": "vllm", b"sglang:": "sglang", b"llamacpp:": "llama.cpp"}
    return next((name for prefix, name in names.items() if prefix in metrics), "unknown")


def read_slots(body: bytes) -> int | None:
    """The slots of a llama.cpp server, by its `/props`; None where the text does not say."""
    try:
        return max(0, msgspec.json.decode(body, type=Props).total_slots) or None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
