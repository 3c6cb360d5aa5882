"""Whatever fails in a step of the GPU engine, and wherever, ends that step's requests and nothing else.

Everything that a step asks of its device, and each part of it on the host, is a call that may fail. Requests of all kinds keep two steps
in flight, laid out one by one or recorded, until each call has failed once, one after the other.
"""

import gc
import signal
from collections.abc import Iterator
from multiprocessing import Pipe
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import msgspec
import pytest
import torch
from transformers import LlamaConfig

from evenhand_engine.config import EngineConfig
from evenhand_engine.core import engine, loading
from evenhand_engine.core.device_sampling import Planned, SamplingStep, StepSampler
from evenhand_engine.core.engine import run_core
from evenhand_engine.messages import EngineFailed, FromCore, StepOutputs
from evenhand_engine.scheduler.request import FinishReason
from evenhand_engine.structured import grammars
from evenhand_engine.structured.compiler import Compiler
from evenhand_engine.text.tokenizer import Tokenizer
from evenhand_kernels.device import Event

from .conftest import make_checkpoint
from .device_engine import PROMPTS, Model
from .failing_engine import KINDS, PARTS, Calls, FailingDevice, Served, add

SMALL = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "hidden_size": 64}
QUIET_STEPS = 15
"""As many without a call that has not failed yet, and all have."""


@pytest.fixture
def calls() -> Calls:
    return Calls()


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("llama"), LlamaConfig, vocab_size=tokenizer.vocab_size, **SMALL)[0]


@pytest.fixture
def served(directory: Path, tokenizer: Tokenizer, calls: Calls, monkeypatch: pytest.MonkeyPatch) -> Served:
    compiler = Compiler(lambda: tokenizer)
    for owner, name in PARTS:
        monkeypatch.setattr(owner, name, calls.wrap(f"{owner.__name__}.{name}", getattr(owner, name)))
    monkeypatch.setattr(engine.logger, "error", lambda *_, **__: None)  # a record would keep a failed step's frames
    model = Model.load(directory, device=FailingDevice(calls))
    return Served(model, calls, lambda: compiler.compile("t", grammars.regex("[a-h]{30}")))


def test_a_failure_anywhere_ends_the_requests_of_its_step_alone(served: Served, calls: Calls) -> None:
    device, expected = served.device, {}
    for kind in KINDS:
        served.add(kind)
        served.finish()
        (expected[kind],) = (tokens for name, tokens in served.tokens.items() if name.startswith(kind))
    num_alive = device.num_alive
    for kinds in (
        list(KINDS),
        [kind for kind in KINDS if kind != "guided"],
    ):  # without a grammar steps are waited for later
        num_quiet = 0
        while num_quiet < QUIET_STEPS:
            num_failed = len(calls.failed)
            served.add_more(kinds)
            served.core._advance()
            served.abort_one()
            calls.is_time = served.core._num_failed_steps == 0
            num_quiet = 0 if len(calls.failed) > num_failed else num_quiet + 1
        calls.is_time = False
        served.finish()

    assert len(calls.failed) > 50
    places = {(part, place) for part, place, _ in calls.failed}
    assert places >= {("submit", f"{owner.__name__}.{name}") for owner, name in PARTS}
    assert places >= {("submit", place) for place in ("launch", "replay", "pinned", "record", "wait")}
    assert places >= {("collect", "wait"), ("collect", "SamplingStep._read")}
    for name, end in served.ends.items():
        whole, tokens = expected[name.split()[0]], served.tokens[name]
        if name in served.failed:
            assert end in (FinishReason.ERROR, FinishReason.ABORT)
        else:
            assert end in (FinishReason.LENGTH, FinishReason.ABORT)
        assert tokens == (whole if end is FinishReason.LENGTH else whole[: len(tokens)])
    assert {FinishReason.LENGTH, FinishReason.ABORT, FinishReason.ERROR} == set(served.ends.values())
    served.assert_nothing_is_left()
    assert device.num_alive == num_alive


def test_steps_that_keep_failing_end_the_core_with_one_line(
    directory: Path, monkeypatch: pytest.MonkeyPatch, restored_process: None
) -> None:
    """Each ends the one request that it has; the third ends the core, and requests that wait have no end of their own."""
    requests = [add(f"r{number}", PROMPTS[1]) for number in range(4)]
    config = EngineConfig(
        model=str(directory),
        device="emulated",
        max_num_seqs=1,
        max_num_batched_tokens=64,
        max_model_len=96,
        kv_cache_bytes=1 << 20,
    )
    loaded = loading.load_model(config)

    def broken(*_: object) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nCompile with `TORCH_USE_CUDA_DSA`\n")

    monkeypatch.setattr(StepSampler, "sample", broken)
    monkeypatch.setattr(loading, "load_model", lambda *_: loaded)
    ours, theirs = Pipe()
    for request in requests:
        ours.send_bytes(msgspec.msgpack.encode(request))
    with pytest.raises(SystemExit):
        run_core(config, theirs)
    decoder, ends, failures = msgspec.msgpack.Decoder(FromCore), {}, []
    while not failures:
        assert ours.poll(30), "it ended without a word"
        message = decoder.decode(ours.recv_bytes())
        if isinstance(message, StepOutputs):
            ends |= {output.request_id: output.finish_reason for output in message.outputs if output.finish_reason}
        elif isinstance(message, EngineFailed):
            failures.append(message.message)
    ours.close()
    assert failures == [
        "RuntimeError: CUDA error: an illegal memory access was encountered Compile with `TORCH_USE_CUDA_DSA`"
    ]
    assert ends.pop("r0") is FinishReason.ERROR and "r3" not in ends and {*ends.values()} <= {FinishReason.ERROR}


@pytest.fixture
def restored_process() -> Iterator[None]:
    """What the core's process does to itself."""
    handler = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, handler)
    gc.enable()
    gc.unfreeze()


def test_a_step_that_fails_while_the_next_waits_for_it_fails_itself_too() -> None:
    """Or those of its requests that the next one has not would go on, told of half of it."""

    def fail(_: object) -> None:
        raise RuntimeError("the second of two followers")

    planned = SimpleNamespace(samples=SimpleNamespace(drafts={}), scored=(), structured=SimpleNamespace(advance=fail))
    event, token_ids = SimpleNamespace(wait=lambda: None), torch.tensor([3], dtype=torch.int32)
    step = SamplingStep(cast(Planned, planned), cast(Event, event), token_ids, {}, None, None, [])
    for _ in range(2):
        with pytest.raises(RuntimeError, match="second"):
            step.wait()
