"""Shared by the engine's tests: a small tokenizer, a scripted engine core, and the server around them."""

import asyncio
import contextlib
import json
import os
import queue
import socket
import threading
import time
import urllib.parse
from array import array
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import openai
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from evenhand_engine.config import EngineConfig
from evenhand_engine.frontend.service import EngineService
from evenhand_engine.frontend.settings import ServerSettings
from evenhand_engine.messages import (
    AbortRequest,
    AddRequest,
    EngineReady,
    EngineStats,
    FromCore,
    Reconfigure,
    Shutdown,
    StepOutputs,
    ToCore,
)
from evenhand_engine.scheduler.request import FinishReason, RequestOutput
from evenhand_engine.server.startup import Running, start_server
from evenhand_engine.text.tokenizer import Tokenizer

WAIT_SECONDS = 20.0
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


class _ThreadProcess:
    """Stands for the core's process, while the core is threads of this one."""

    def __init__(self, connect: Callable[[], Connection]) -> None:
        self.connect = connect

    def join(self) -> None: ...

    def kill(self) -> None: ...


def token_ids(request: AddRequest) -> list[int]:
    """Those of its prompt."""
    return array("I", request.prompt_token_ids).tolist()


def idle_stats(config_digest: str) -> EngineStats:
    """Of a core that has nothing to do."""
    return EngineStats(
        time=time.monotonic(),
        step_id=0,
        num_running=0,
        num_waiting=0,
        num_deferred=0,
        num_kv_blocks=64,
        num_free_kv_blocks=64,
        num_preemptions=0,
        num_prefix_queries=0,
        num_prefix_hits=0,
        num_drafts=0,
        num_draft_tokens=0,
        num_accepted_tokens=0,
        virtual_time=0.0,
        config_digest=config_digest,
        step_tokens=(),
        step_seconds=(),
        tenants=(),
    )


M = TypeVar("M", bound=ToCore)
Reply = Callable[[AddRequest], Iterable[RequestOutput]]


@dataclass
class ScriptedCore:
    """The other end of the pipes. Answers every request at once with `reply`, or leaves it to the test.

    Attributes:
        reply: the outputs of a request; None: the test sends them itself.
        received: what the HTTP side sent, in order.
        origins: which connection each request came by, as a number.
        tells_config: whether it says which config it enforces, as a core does after its next step.
    """

    reply: Reply | None = None
    received: "queue.Queue[ToCore]" = field(default_factory=queue.Queue)
    origins: dict[str, int] = field(default_factory=dict)
    max_model_len: int = 256
    tells_config: bool = False
    knows_grammars: bool = True
    scores_prompts: bool = True
    _connection: Connection | None = None  # the first, which is the owner's
    _others: list[Connection] = field(default_factory=list)  # of API servers
    _sending: threading.Lock = field(default_factory=threading.Lock)
    _open: dict[str, Connection] = field(default_factory=dict)  # requests without an end, and where they came from

    def spawn(self, config: EngineConfig) -> tuple[_ThreadProcess, Connection]:
        theirs, self._connection = Pipe(duplex=True)
        self.start()
        threading.Thread(target=self._run, args=(self._connection,), name="scripted-core", daemon=True).start()
        return _ThreadProcess(self.connect), theirs

    def connect(self) -> Connection:
        """One more pipe, for an API server."""
        theirs, ours = Pipe(duplex=True)
        self._others.append(ours)
        ours.send_bytes(msgspec.msgpack.encode(self.ready()))
        threading.Thread(target=self._run, args=(ours,), name="scripted-core", daemon=True).start()
        return theirs

    def start(self) -> None:
        self.send(self.ready())

    def ready(self) -> EngineReady:
        return EngineReady(
            model_name="tiny",
            max_model_len=self.max_model_len,
            num_kv_blocks=64,
            block_size=16,
            dtype="float32",
            device="cpu",
            knows_grammars=self.knows_grammars,
            scores_prompts=self.scores_prompts,
        )

    def _run(self, connection: Connection) -> None:
        decoder = msgspec.msgpack.Decoder(ToCore)
        try:
            while True:
                message = decoder.decode(connection.recv_bytes())
                if isinstance(message, Shutdown) and connection is not self._connection:
                    return _hang_up(connection)
                if isinstance(message, AddRequest):
                    self._open[message.request_id] = connection
                    self.origins[message.request_id] = connection.fileno()
                self.received.put(message)
                if isinstance(message, Shutdown):
                    return self.die()
                if isinstance(message, Reconfigure) and self.tells_config:
                    self.send(StepOutputs(outputs=(), stats=idle_stats(message.config.digest())))
                if isinstance(message, AddRequest):
                    for output in self.reply(message) if self.reply is not None else ():
                        self.output(output)
                if isinstance(message, AbortRequest) and message.request_id in self._open:
                    self.output(self.ending(message))
        except (EOFError, OSError):
            if connection is self._connection:
                return self.die()
            for request_id, origin in list(self._open.items()):
                if origin is connection:
                    self.received.put(AbortRequest(request_id=request_id, reason=FinishReason.ABORT))  # as a core does
            return None

    def ending(self, abort: AbortRequest) -> RequestOutput:
        """The end of a request, which the core says also where it was told."""
        num_output_tokens = abort.num_output_tokens or 0
        return RequestOutput(
            request_id=abort.request_id, finish_reason=abort.reason, num_output_tokens=num_output_tokens
        )

    def send(self, message: FromCore) -> None:
        self.send_bytes(msgspec.msgpack.encode(message))

    def send_bytes(self, data: bytes) -> None:
        assert self._connection is not None
        with self._sending:
            self._connection.send_bytes(data)

    def output(self, *outputs: RequestOutput) -> None:
        """One step's: each goes to where its request came from."""
        parts: dict[Connection | None, list[RequestOutput]] = {}
        for output in outputs:
            parts.setdefault(self._open.get(output.request_id, self._connection), []).append(output)
            if output.finish_reason is not None:
                self._open.pop(output.request_id, None)
        for connection, part in parts.items():
            assert connection is not None
            with self._sending, contextlib.suppress(OSError):  # one that is gone
                connection.send_bytes(msgspec.msgpack.encode(StepOutputs(outputs=tuple(part))))

    def expect(self, kind: type[M]) -> M:
        """The next message of this kind; fails if none comes."""
        while True:
            message = self.received.get(timeout=WAIT_SECONDS)
            if isinstance(message, kind):
                return message

    def die(self) -> None:
        """End the connections as the end of the process would."""
        assert self._connection is not None
        for connection in (self._connection, *self._others):
            _hang_up(connection)


def _hang_up(connection: Connection) -> None:
    """Also under the feet of the thread that reads."""
    with contextlib.suppress(OSError), socket.socket(fileno=os.dup(connection.fileno())) as end:
        end.shutdown(socket.SHUT_RDWR)


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
    """Runs `start_server` in a thread with its own event loop, until it is told to stop."""

    def __init__(self, settings: ServerSettings, config: EngineConfig, core: ScriptedCore) -> None:
        self._args = settings, config, core
        self._started: Future[Running] = Future()
        self._thread = threading.Thread(target=asyncio.run, args=(self._serve(),), name="server")
        self._thread.start()

    async def _serve(self) -> None:
        settings, config, core = self._args
        self._loop, self._stopping = asyncio.get_running_loop(), asyncio.Event()
        try:
            async with start_server(settings, config, spawn=core.spawn) as running:
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
            defaults: dict[str, Any] = {"host": "127.0.0.1", "port": 0, "admin_port": 0}
            thread = _Thread(ServerSettings(**defaults | settings), EngineConfig(model=str(model_dir)), core)
            stack.callback(thread.stop)
            return Server(thread.running(), core, stack.enter_context(contextlib.ExitStack()))

        yield start


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
            for number, token_id in enumerate(token_ids[:limit], 1):
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


@pytest.fixture
def speaking(tool_model: Path, serve: Serve, say: Say) -> Callable[..., Server]:
    """A server whose model says a text."""
    return lambda text, **settings: serve(core=ScriptedCore(say(text), max_model_len=2048), **settings)
