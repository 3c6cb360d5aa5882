"""The process that stands for a Pod's container: started, probed, started again when it ends, stopped with grace."""

import asyncio
import contextlib
import time
from datetime import UTC, datetime
from typing import Any

import aiohttp

from cluster.programs import Program

Object = dict[str, Any]

FIRST_RESTART_DELAY = 0.1
LONGEST_RESTART_DELAY = 5.0


class Container:
    """One container of one Pod: its spec, its process, and what a kubelet would say of it in the Pod's status.

    Of the probes only readiness by httpGet is run. `tick` is called often and never waits.
    """

    def __init__(self, spec: Object, address: str, program: Program) -> None:
        self.program = program
        self._spec = spec
        self._address = address
        self._restart_count = 0
        self._ready = False
        self._state: Object = {"waiting": {"reason": "ContainerCreating"}}
        self._last_state: Object = {}
        self._start_at = 0.0
        self._probing: asyncio.Task[None] | None = None
        self._stopping: asyncio.Task[None] | None = None

    @property
    def ready(self) -> bool:
        """Whether it runs and its readiness probe, if it has one, succeeds."""
        return self._ready

    @property
    def started(self) -> bool:
        """Whether it has ever run."""
        return bool(self._last_state) or "waiting" not in self._state

    @property
    def stopped(self) -> bool:
        """Whether `stop` was called and has come to its end."""
        return self._stopping is not None and self._stopping.done()

    def tick(self) -> None:
        """Starts the process where it should run and does not."""
        if self._stopping:
            return
        if "running" in self._state and (exit_code := self.program.exit_code()) is not None:
            self._ended(exit_code)
        if "running" not in self._state and time.monotonic() >= self._start_at:
            self._run()

    def stop(self, grace: float) -> None:
        """Begins to end it: SIGTERM, and SIGKILL after `grace` seconds. More calls change nothing."""
        if self._stopping is None:
            self._ready = False
            self._cancel_probe()
            self._stopping = asyncio.create_task(asyncio.to_thread(self.program.stop, grace))

    async def wait_stopped(self) -> None:
        """Returns when `stop`, called before, has come to its end."""
        assert self._stopping
        await self._stopping

    def status(self) -> Object:
        """Its row in the Pod's containerStatuses."""
        return {
            "name": self._spec["name"],
            "image": self._spec["image"],
            "imageID": self._spec["image"],
            "ready": self._ready,
            "started": "running" in self._state,
            "restartCount": self._restart_count,
            "state": self._state,
            "lastState": self._last_state,
        }

    def _run(self) -> None:
        if self.started:
            self._restart_count += 1
        self.program.start()
        self._state = {"running": {"startedAt": now()}}
        probe = self._spec.get("readinessProbe")
        if probe is None:
            self._ready = True
        else:
            self._probing = asyncio.create_task(self._probe(probe))

    def _ended(self, exit_code: int) -> None:
        self.program.stop(grace=0)  # what it left behind in its process group
        self._cancel_probe()
        self._ready = False
        # a signal is told as a shell tells it
        code = exit_code if exit_code >= 0 else 128 - exit_code
        reason = "Error" if code else "Completed"
        started_at = self._state["running"]["startedAt"]
        self._last_state = {
            "terminated": {"exitCode": code, "reason": reason, "startedAt": started_at, "finishedAt": now()}
        }
        self._state = {"waiting": {"reason": "CrashLoopBackOff"}}
        self._start_at = time.monotonic() + min(FIRST_RESTART_DELAY * 2**self._restart_count, LONGEST_RESTART_DELAY)

    def _cancel_probe(self) -> None:
        if self._probing:
            self._probing.cancel()
            self._probing = None

    async def _probe(self, probe: Object) -> None:
        """Keeps `ready` true to the probe; often until it first succeeds, then as often as the probe says."""
        url, failures = self._probe_url(probe["httpGet"]), 0
        timeout = aiohttp.ClientTimeout(total=probe.get("timeoutSeconds", 1))
        async with aiohttp.ClientSession(timeout=timeout) as session:
            while True:
                succeeded = False
                with contextlib.suppress(aiohttp.ClientError, TimeoutError, OSError):
                    async with session.get(url, ssl=False, allow_redirects=False) as response:
                        succeeded = response.status < 400
                failures = 0 if succeeded else failures + 1
                if succeeded:
                    self._ready = True
                elif failures >= probe.get("failureThreshold", 3):
                    self._ready = False
                await asyncio.sleep(probe.get("periodSeconds", 10) if self._ready else 0.1)

    def _probe_url(self, get: Object) -> str:
        ports = {each.get("name"): each["containerPort"] for each in self._spec.get("ports", [])}
        port = ports.get(get["port"], get["port"])
        return f"{get.get('scheme', 'HTTP').lower()}://{self._address}:{port}{get.get('path', '/')}"


def now() -> str:
    """The time as the API writes it."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
