"""What the HTTP side costs: a scripted engine core, no model, and clients that read event streams.

The server as `evenhand serve` runs it, a core that sends one token to every stream in each step, and
clients that note when each token comes. The first part sends more than one core of the machine can write: what is not
written yet is coalesced, and each token counts. The second sends the steps of a calm engine: how much later than the core
sent it does a token reach its client. Then both again with two API servers (`_2`), each with as many streams.

`tokens_per_s_per_core`: tokens delivered for each second of CPU that the server used. `added_ms`: from the core's `send` until the
token is in its client's socket, by the time stamp that the kernel gives it there (Linux): what the clients take to read it, all
of them in one process, is no part of it.
"""

import asyncio
import gc
import json
import multiprocessing
import os
import socket
import tempfile
import time
from array import array
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import common
import psutil
import tokenizers
import uvloop
from arrivals import Client, Clients
from tokenizers import decoders, models

from evenhand_engine.backends.engine_client import ConnectedCore, SpawnedCore
from evenhand_engine.config import EngineConfig
from evenhand_engine.core.connections import Connections
from evenhand_engine.frontend.settings import ServerSettings
from evenhand_engine.messages import AddRequest, EngineReady, Shutdown
from evenhand_engine.scheduler.request import FinishReason, RequestOutput
from evenhand_engine.server.startup import start_server

_KEYS = {
    "tokens_per_s": "tokens/s",
    "tokens_per_s_per_core": "tokens/s of CPU",
    "added_p50_ms": "added p50 ms",
    "added_p99_ms": "p99 ms",
    "rss_mib": "MiB",
}
LETTER = 97  # the token, and the character that it is
SPAWN = multiprocessing.get_context("spawn")


def make_model(directory: Path) -> None:
    """A vocabulary of bytes, and the config of a model that is never loaded."""
    tokenizer = tokenizers.Tokenizer(models.BPE({chr(code): code for code in range(128)}, []))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 128, "eos_token_id": 0}
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1}
    (directory / "config.json").write_text(json.dumps(config | sizes | {"max_position_embeddings": 65536}))


def divide_cores(num_processes: int) -> tuple[set[int], set[int]]:
    """Those of the clients, and those of server and core: clients have a core of their own, as they are on other machines in earnest;
    where there are too few for that, all are everybody's."""
    cores = sorted(os.sched_getaffinity(0))
    return (set(cores[-1:]), set(cores[:-1])) if len(cores) > num_processes else (set(cores), set(cores))


def run_core(
    connection: Connection,
    doors: socket.socket,
    num_streams: int,
    num_steps: int,
    step_seconds: float,
    sent: Connection,
) -> None:
    """Once all streams have come, send each a token in every step; then tell when each step was sent.

    As an engine core does, it looks for no garbage between: that would be told as the server's delay.
    """
    gc.disable()
    ready = EngineReady(
        model_name="scripted", max_model_len=65536, num_kv_blocks=64, block_size=16, dtype="float32", device="none"
    )
    connections = Connections(connection, doors, ready)
    connections.start()
    request_ids: list[str] = []
    while len(request_ids) < num_streams:
        if isinstance(message := connections.commands.get(), AddRequest):
            request_ids.append(message.request_id)
    connections.publish([RequestOutput(request_id=request_id) for request_id in request_ids])
    time.sleep(0.5)
    times, due = array("d"), time.monotonic()
    for step in range(num_steps):
        # until then the server has a core of its own for the last step
        time.sleep(max(0.0, due + step_seconds / 2 - time.monotonic()))
        reason = FinishReason.LENGTH if step == num_steps - 1 else None
        outputs = [
            RequestOutput(request_id=i, token_ids=(LETTER,), finish_reason=reason, num_output_tokens=num_steps)
            for i in request_ids
        ]
        due += step_seconds
        time.sleep(max(0.0, due - time.monotonic()))
        times.append(time.time())
        connections.publish(outputs)
    sent.send(times)
    while not isinstance(connections.commands.get(), Shutdown):
        pass


def run_server(model: Path, num_processes: int, core: Connection, doors: socket.socket, control: Connection) -> None:
    """Serve until told to stop; tells where, and at the end how much CPU the streams took and how much memory."""

    async def serve() -> None:
        settings = ServerSettings(host="127.0.0.1", port=0, admin_port=0, api_server_count=num_processes)
        process = SpawnedCore(ConnectedCore(core), doors)  # its process is not this one's to end
        async with start_server(settings, EngineConfig(model=str(model)), spawn=lambda _: (process, core)) as running:
            control.send(running.url)
            await asyncio.to_thread(control.recv)  # the streams are open
            before, _ = usage()
            await asyncio.to_thread(control.recv)  # the streams have ended
            after, num_bytes = usage()
            control.send((after - before, num_bytes))

    uvloop.run(serve())


def usage() -> tuple[float, int]:
    """Seconds of CPU, and bytes of memory, of this process and of those that it has started."""
    own = psutil.Process()
    seconds, num_bytes = 0.0, 0
    for process in (own, *own.children()):
        times = process.cpu_times()
        seconds += times.user + times.system
        num_bytes += process.memory_info().rss
    return seconds, num_bytes


def token_times(client: Client) -> "array[float]":
    """When each token came."""
    times = array("d")
    for now, event in client.events():
        at = event.find(b'"text":"')
        num_tokens = event.find(b'"', at + 8) - at - 8 if at >= 0 else 0
        times.extend([now] * num_tokens)
    return times


def read_streams(url: str, num_streams: int, num_tokens: int, control: Connection) -> "list[array[float]]":
    """When each stream's tokens came; tells when the streams are open and when they have ended."""
    host, port = url.removeprefix("http://").split(":")
    body = json.dumps({"prompt": "x", "stream": True, "max_tokens": num_tokens, "ignore_eos": True}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
    streams = [Client((host, int(port)), head.encode() + body) for _ in range(num_streams)]
    reading = Clients()
    for stream in streams:
        stream.read()  # the first event: it runs
        reading.add(stream)
    control.send("open")
    while reading.num_open:
        reading.read()
    control.send("ended")
    reading.close()
    return [token_times(stream) for stream in streams]


def measure(
    model: Path, num_processes: int, num_streams: int, tokens_per_second: float, seconds: float
) -> dict[str, Any]:
    """One part: so many streams, each of which gets its part of the tokens."""
    clients_cores, servers_cores = divide_cores(num_processes)
    step_seconds = num_streams / tokens_per_second
    num_steps = max(2, round(seconds / step_seconds))
    to_core, from_server = SPAWN.Pipe(duplex=True)
    sent, sends = SPAWN.Pipe(duplex=False)
    control, servers_control = SPAWN.Pipe(duplex=True)
    cores_doors, doors = socket.socketpair()
    core = SPAWN.Process(
        target=run_core, args=(to_core, cores_doors, num_streams, num_steps, step_seconds, sends), daemon=True
    )
    server = SPAWN.Process(target=run_server, args=(model, num_processes, from_server, doors, servers_control))
    with common.on_cores(servers_cores):
        core.start()
        server.start()
    for end in (to_core, from_server, cores_doors, doors):
        end.close()
    try:
        with common.on_cores(clients_cores):
            received = read_streams(control.recv(), num_streams, num_steps, control)
        cpu_seconds, num_bytes = control.recv()
        times = sent.recv()
    finally:
        server.join(10)
        core.kill()
    assert all(len(each) == num_steps for each in received), "a token was lost"
    added = sorted(1000 * (came - went) for each in received for came, went in zip(each, times, strict=True))
    wall = max(each[-1] for each in received) - times[0]
    return {
        "tokens_per_s": round(num_streams * num_steps / wall),
        "tokens_per_s_per_core": round(num_streams * num_steps / cpu_seconds),
        "added_p50_ms": round(added[len(added) // 2], 2),
        "added_p99_ms": round(added[len(added) * 99 // 100], 2),
        "rss_mib": round(num_bytes / 2**20),
    }


def main() -> None:
    parser = common.arguments(__doc__)
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--flood", type=float, default=60_000, help="tokens a second for each process: first part")
    parser.add_argument("--calm", type=float, default=5_000, help="tokens a second for each process: second part")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2], help="values of --api-server-count")
    options = parser.parse_args()
    num_streams = 16 if options.quick else options.streams
    seconds = dict.fromkeys(("flood", "calm"), 0.5) if options.quick else {"flood": 4.0, "calm": 15.0}
    with tempfile.TemporaryDirectory() as folder:
        make_model(Path(folder))
        parts = {
            f"{name}_{count}" if count > 1 else name: measure(
                Path(folder), count, count * num_streams, count * rate, seconds[name]
            )
            for count in options.processes
            for name, rate in (("flood", options.flood), ("calm", options.calm))
        }
    rows = [[name, *(f"{part[key]:,}" for key in _KEYS)] for name, part in parts.items()]
    common.print_table(f"{num_streams} streams for each process", ["part", *_KEYS.values()], rows)
    first = list(parts.values())
    results = {"tokens_per_s_per_core": first[0]["tokens_per_s_per_core"], "added_p99_ms": first[1]["added_p99_ms"]}
    common.finish("frontend", results | {"num_streams": num_streams, "parts": parts})


if __name__ == "__main__":
    main()
