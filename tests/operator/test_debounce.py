"""Many signals, few wake-ups, none lost."""

import asyncio

import pytest

from evenhand_operator.debounce import Debounce
from harness.virtual_time import VirtualTime


async def signal_at(debounce: Debounce, *times: float) -> None:
    loop = asyncio.get_running_loop()
    for time in times:
        await asyncio.sleep(time - loop.time())
        debounce.signal()


async def wake_ups(debounce: Debounce, *times: float) -> list[tuple[float, float]]:
    """For each wake-up its time and that of the first signal that it stands for."""
    loop, found = asyncio.get_running_loop(), []
    signals = asyncio.ensure_future(signal_at(debounce, *times))
    while (first_at := await debounce.wait(timeout=10)) is not None:
        found.append((round(loop.time(), 3), round(first_at, 3)))
    await signals
    return found


@pytest.mark.parametrize(
    ("signals", "expected"),
    [
        ([1.0], [(1.05, 1.0)]),
        ([1.0, 1.04, 1.08], [(1.13, 1.0)]),
        ([1.0, 1.2], [(1.05, 1.0), (1.25, 1.2)]),
        ([1.0 + index / 50 for index in range(60)], [(1.5, 1.0), (2.0, 1.5), (2.23, 2.0)]),
        ([], []),
    ],
)
def test_signals_are_gathered(
    virtual_time: VirtualTime, signals: list[float], expected: list[tuple[float, float]]
) -> None:
    assert virtual_time.run(wake_ups(Debounce(0.05, 0.5), *signals)) == expected


def test_many_signals_are_waited_for_longer_until_it_is_quiet(virtual_time: VirtualTime) -> None:
    burst = [1.0 + index / 100 for index in range(9)]
    more = [1.0 + index / 10 for index in range(1, 26)]  # to 3.5
    debounce = Debounce(0.05, 0.5, 4.0)
    assert virtual_time.run(wake_ups(debounce, *sorted(burst + more), 9.0)) == [(3.0, 1.0), (3.7, 3.0), (9.05, 9.0)]


def test_signal_while_nobody_waits_is_kept(virtual_time: VirtualTime) -> None:
    async def scenario() -> float | None:
        debounce = Debounce(0.05, 0.5)
        debounce.signal()
        await asyncio.sleep(3)
        return await debounce.wait(timeout=1)

    assert virtual_time.run(scenario()) == 0.0


def test_waiting_ends_without_a_signal(virtual_time: VirtualTime) -> None:
    assert virtual_time.run(Debounce(0.05, 0.5).wait(timeout=1)) is None


def test_what_is_signalled_in_a_rest_comes_after_it(virtual_time: VirtualTime) -> None:
    async def scenario() -> list[tuple[float, float]]:
        debounce, loop, found = Debounce(1.0, 5.0, rest=30.0), asyncio.get_running_loop(), []
        signals = asyncio.ensure_future(signal_at(debounce, 2.0, 10.0, 28.0, 66.0))
        while (first_at := await debounce.wait(timeout=60)) is not None:
            found.append((loop.time(), first_at))
        await signals
        return found

    assert virtual_time.run(scenario()) == [(3.0, 2.0), (33.0, 10.0), (67.0, 66.0)]


def test_rest_is_longer_than_anybody_waits(virtual_time: VirtualTime) -> None:
    assert virtual_time.run(wake_ups(Debounce(1.0, 5.0, rest=30.0), 2.0, 10.0)) == [(3.0, 2.0)]
