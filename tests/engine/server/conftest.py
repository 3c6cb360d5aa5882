"""Shared by the engine's tests: a small tokenizer, a scripted engine core, and the server around them."""

import asyncio
import contextlib
import itertools
import json
import socket
import threading
import urllib.parse
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from evenhand_engine.backends.upstream_connection import UpstreamSettings
from evenhand_engine.config import EngineConfig
from evenhand_engine.frontend.engine_service import EngineService
from evenhand_engine.frontend.settings import ServerSettings
from evenhand_engine.messages import (
    AddRequest,
)
from evenhand_engine.scheduler.request import FinishReason, RequestOutput
from evenhand_engine.server.sidecar_startup import start_sidecar
from evenhand_engine.server.startup import Running, start_server
from evenhand_engine.text.tokenizer import Tokenizer

from .scripted_core import WAIT_SECONDS, Reply, ScriptedCore

for _each in ("connect", "read", "write", "pool"):  # httpx2's own 5 s may be too few for a machine that others use too
    setattr(httpx2._config.DEFAULT_TIMEOUT_CONFIG, _each, WAIT_SECONDS)

CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif -%}
"""
TOOL_TEMPLATE = (
    "{%- if tools %}{% for tool in tools %}<tool_call> {{ tool | tojson }}\n{% endfor %}{% endif -%}\n" + CHAT_TEMPLATE
)
TINY_LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 320,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "eos_token_id": 2,
}
CORPUS = [
    "The capital of France is Paris. The capital of Italy is Rome, isn't it?",
    "Ein Käse für 3 €, naïve façade; 東京は日本の首都です。 👩‍🚀 flew past 🪐!",
]


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model without weights: byte-level BPE of a few hundred tokens, a chat template, a Llama's config."""
    directory = tmp_path_factory.mktemp("model")
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS[:1], trainer)  # so that the second text's code points stay split in bytes
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {"eos_token": "<|im_end|>", "chat_template": CHAT_TEMPLATE}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    (directory / "config.json").write_text(json.dumps(TINY_LLAMA))
    return directory


@dataclass
class Server:
    """A server in a thread of its own, and clients for it."""

    running: Running
    core: ScriptedCore
    _clients: contextlib.ExitStack

    @property
    def url(self) -> str:
        return self.running.url

    @property
    def admin_url(self) -> str:
        return self.running.admin_url

    @property
    def engine(self) -> EngineService:
        """What serves the public port in this process."""
        assert self.running.engine is not None
        return self.running.engine

    def client(self, **options: Any) -> openai.OpenAI:
        return self._clients.enter_context(openai.OpenAI(**self._options(options)))

    def async_client(self, **options: Any) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(**self._options(options))

    def _options(self, options: dict[str, Any]) -> dict[str, Any]:
        defaults = {"base_url": f"{self.url}/v1", "api_key": "none", "max_retries": 0, "timeout": WAIT_SECONDS}
        return defaults | options


def connect(server: Server) -> socket.socket:
    host, port = urllib.parse.urlsplit(server.url).netloc.split(":")
    return socket.create_connection((host, int(port)), timeout=WAIT_SECONDS)


class _Thread:
    """Runs a server in a thread with its own event loop, until it is told to stop."""

    def __init__(self, start: Callable[[], contextlib.AbstractAsyncContextManager[Running]]) -> None:
        self._start = start
        self._started: Future[Running] = Future()
        self._thread = threading.Thread(target=asyncio.run, args=(self._serve(),), name="server")
        self._thread.start()

    async def _serve(self) -> None:
        self._loop, self._stopping = asyncio.get_running_loop(), asyncio.Event()
        try:
            async with self._start() as running:
                self._started.set_result(running)
                await self._stopping.wait()
        except BaseException as error:
            if self._started.done():
                raise
            self._started.set_exception(error)

    def running(self) -> Running:
        return self._started.result(WAIT_SECONDS)

    def stop(self) -> None:
        with contextlib.suppress(RuntimeError):  # it has ended by itself
            self._loop.call_soon_threadsafe(self._stopping.set)
        self._thread.join(WAIT_SECONDS)
        assert not self._thread.is_alive(), "the server did not stop"


Serve = Callable[..., Server]
Say = Callable[[str], Reply]


@pytest.fixture
def serve(model_dir: Path) -> Iterator[Serve]:
    """Starts servers on free ports around a scripted core: `serve(reply, **ServerSettings fields)`."""
    with contextlib.ExitStack() as stack:

        def start(reply: Reply | None = None, *, core: ScriptedCore | None = None, **settings: Any) -> Server:
            core = core or ScriptedCore(reply)
            config = EngineConfig(model=str(model_dir))
            thread = _Thread(lambda: start_server(_on_free_ports(settings), config, spawn=core.spawn))
            stack.callback(thread.stop)
            return Server(thread.running(), core, stack.enter_context(contextlib.ExitStack()))

        yield start


@pytest.fixture(params=["engine", "sidecar"])
def serve_either(request: pytest.FixtureRequest, serve: Serve) -> Iterator[Serve]:
    """The same, and again with the settings, policies among them, in a sidecar before a server that knows of none."""
    if request.param == "engine":
        yield serve
        return
    with contextlib.ExitStack() as stack:

        def start(reply: Reply | None = None, *, core: ScriptedCore | None = None, **settings: Any) -> Server:
            engine = serve(reply, core=core)
            upstream = UpstreamSettings(url=engine.url)
            thread = _Thread(lambda: start_sidecar(_on_free_ports(settings), upstream))
            stack.callback(thread.stop)
            return Server(thread.running(), engine.core, stack.enter_context(contextlib.ExitStack()))

        yield start


def _on_free_ports(settings: dict[str, Any]) -> ServerSettings:
    defaults: dict[str, Any] = {"host": "127.0.0.1", "port": 0, "admin_port": 0}
    return ServerSettings(**defaults | settings)


@pytest.fixture
def say(model_dir: Path) -> Say:
    """`say(text)`: a reply of that text, a token at a time, then the end of sequence, within max_tokens."""
    tokenizer = Tokenizer(model_dir)
    eos = min(tokenizer.eos_token_ids)

    def make(text: str) -> Reply:
        token_ids = [*tokenizer.encode(text), eos]

        def reply(request: AddRequest) -> Iterator[RequestOutput]:
            yield RequestOutput(request_id=request.request_id, num_cached_tokens=3)
            limit = request.sampling_params.max_tokens
            endless = itertools.chain(token_ids, itertools.repeat(eos))  # where the end is ignored
            for number, token_id in enumerate(itertools.islice(endless, limit), 1):
                reason = None
                if token_id in request.sampling_params.stop_token_ids:
                    reason = FinishReason.STOP
                elif number == limit:
                    reason = FinishReason.LENGTH
                yield RequestOutput(request_id=request.request_id, token_ids=(token_id,), finish_reason=reason)
                if reason is not None:
                    return

        return reply

    return make


@pytest.fixture
def tool_model(model_dir: Path) -> Iterator[Path]:
    """The tiny model, whose template takes tools while the test runs."""
    path = model_dir / "tokenizer_config.json"
    before = path.read_text()
    path.write_text(json.dumps(json.loads(before) | {"chat_template": TOOL_TEMPLATE}))
    yield model_dir
    path.write_text(before)


@pytest.fixture(params=[False, True], ids=["added", "special"])
def thinking_model(model_dir: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """The tiny model, whose vocabulary has the markers while the test runs."""
    path = model_dir / "tokenizer.json"
    before = path.read_text()
    tokenizer = tokenizers.Tokenizer.from_file(str(path))
    markers = [tokenizers.AddedToken(text, special=request.param) for text in ("<think>", "</think>")]
    tokenizer.add_special_tokens(markers) if request.param else tokenizer.add_tokens(markers)
    tokenizer.save(str(path))
    config = model_dir / "config.json"
    sizes = config.read_text()
    config.write_text(json.dumps(json.loads(sizes) | {"vocab_size": tokenizer.get_vocab_size()}))
    yield model_dir
    path.write_text(before)
    config.write_text(sizes)


@pytest.fixture
def speaking(tool_model: Path, serve: Serve, say: Say) -> Callable[..., Server]:
    """A server whose model says a text."""
    return lambda text, **settings: serve(core=ScriptedCore(say(text), max_model_len=2048), **settings)
