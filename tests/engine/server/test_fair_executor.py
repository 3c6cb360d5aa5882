"""Tenants take turns in the threads that read and tokenize."""

import asyncio
import threading

import pytest

from evenhand_engine.frontend.fair_executor import FairExecutor

from .scripted_core import WAIT_SECONDS


async def test_tenants_take_turns_in_the_threads() -> None:
    executor = FairExecutor(1)
    release, order = threading.Event(), list[str]()
    try:
        first = asyncio.ensure_future(executor.run("flood", release.wait))
        jobs = [executor.run("flood", lambda i=i: order.append(f"flood {i}")) for i in range(3)]  # type: ignore[misc]
        jobs += [executor.run(tenant, lambda t=tenant: order.append(t)) for tenant in ("a", "b")]  # type: ignore[misc]
        waiting = [asyncio.ensure_future(job) for job in jobs]
        await asyncio.sleep(0)
        release.set()
        await asyncio.gather(first, *waiting)
    finally:
        executor.close()
    assert order == ["flood 0", "a", "b", "flood 1", "flood 2"]


async def test_a_tenant_leaves_a_thread_to_the_others() -> None:
    executor = FairExecutor(2)
    release, ran = threading.Event(), list[str]()
    try:
        flood = [asyncio.ensure_future(executor.run("flood", release.wait)) for _ in range(3)]
        await asyncio.wait_for(executor.run("other", lambda: ran.append("other")), WAIT_SECONDS)
        release.set()
        assert await asyncio.gather(*flood) == [True] * 3
    finally:
        release.set()
        executor.close()
    assert ran == ["other"]


async def test_who_gives_up_waiting_takes_no_turn() -> None:
    executor = FairExecutor(1)
    release, ran = threading.Event(), list[str]()
    try:
        first = asyncio.ensure_future(executor.run("a", release.wait))
        given_up = asyncio.ensure_future(executor.run("a", lambda: ran.append("given up")))
        kept = asyncio.ensure_future(executor.run("a", lambda: ran.append("kept")))
        await asyncio.sleep(0)
        given_up.cancel()
        release.set()
        await asyncio.gather(first, kept)
    finally:
        executor.close()
    assert ran == ["kept"]


async def test_errors_come_out_of_the_threads() -> None:
    executor = FairExecutor(1)
    try:
        with pytest.raises(ZeroDivisionError):
            await executor.run("a", lambda: 1 / 0)
        assert await executor.run("a", lambda: 7) == 7
    finally:
        executor.close()
