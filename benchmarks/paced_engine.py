"""`evenhand serve` at the pace of a GPU: everything is the real engine's, but for what computes.

In place of a model stands a clock: a step takes as long as on a device of the simulator (`simulator/device.py`), and every
token is the same word. HTTP, scheduler, processes and streams are those that serve, on this machine's cores, which have next to nothing
else to do. So what depends on the shape of a GPU's steps can be measured where there is no GPU.

Started by `serving.paced`: python paced_engine.py DEVICE KV_TOKENS [options of evenhand serve].
"""

import sys
import time
from collections import deque
from functools import partial
from multiprocessing.connection import Connection
from socket import socket
from typing import Any, cast

from evenhand_engine.backends import engine_client
from evenhand_engine.commands.serve import serve
from evenhand_engine.config import EngineConfig, SchedulerSettings
from evenhand_engine.model.source import resolve_model_dir
from evenhand_engine.scheduler.batch import Batch
from evenhand_engine.scheduler.request import Sampled
from evenhand_engine.scheduler.step_time import shape_of
from evenhand_engine.simulator.device import DEVICES

_WORD = Sampled((260,))


class PacedRunner:
    """A `Runner` whose batches take the device's time, one after another."""

    pipeline_depth = 1

    def __init__(self, device_name: str) -> None:
        self._device = DEVICES[device_name]
        self._due = 0.0
        self._batches: deque[tuple[float, int]] = deque()  # when each is done, and its samples

    def submit(self, batch: Batch) -> None:
        self._due = max(self._due, time.monotonic()) + self._device.seconds(shape_of(batch))
        self._batches.append((self._due, sum(item.num_samples > 0 for item in batch.scheduled)))

    def collect(self) -> list[Sampled]:
        due, num_samples = self._batches.popleft()
        time.sleep(max(0.0, due - time.monotonic()))
        return [_WORD] * num_samples


def paced_core(device_name: str, kv_tokens: int, config: EngineConfig, connection: Connection, doors: socket) -> None:
    """Entry point of the core process."""
    from evenhand_engine.core import engine, loading

    def load(config: EngineConfig, *_: object) -> loading.LoadedModel:
        device = DEVICES[device_name]
        settings = SchedulerSettings(
            scheduling_policy=config.scheduling_policy,
            max_num_seqs=config.max_num_seqs or device.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens or device.max_num_batched_tokens,
            max_model_len=config.max_model_len or 8192,
            num_kv_blocks=kv_tokens // config.block_size,
            block_size=config.block_size,
            enable_prefix_caching=config.enable_prefix_caching,
        )
        directory = resolve_model_dir(config.model)
        return loading.LoadedModel(PacedRunner(device_name), settings, "paced", "none", device_name, directory)

    loading.load_model = cast(Any, load)
    engine.run_core(config, connection, doors)


if __name__ == "__main__":
    engine_client._core_main = partial(paced_core, sys.argv[1], int(sys.argv[2]))
    serve(sys.argv[3:])
