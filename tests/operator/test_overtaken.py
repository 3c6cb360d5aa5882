"""A pod that knows a newer version is gone beyond; one that says so for ever does not move the pool for ever."""

import itertools

from evenhand_operator.overtaken import Overtaken
from evenhand_policy.version import Version

POOL, OTHER = ("inference", "default"), ("inference", "other")


def test_highest_that_was_seen_is_gone_beyond_once() -> None:
    overtaken = Overtaken(lambda: 0.0)
    for epoch in (3, 9, 5):
        overtaken.see(POOL, Version(epoch, 1))
    assert overtaken.due() == {POOL: Version(9, 1)}
    overtaken.raised(POOL)
    assert overtaken.due() == {}


def test_pod_that_says_so_again_and_again_is_heard_ever_more_rarely() -> None:
    now = 0.0
    overtaken = Overtaken(lambda: now)
    raised_at = []
    while now < 3600:
        overtaken.see(POOL, Version(int(now) + 2, 1))
        if overtaken.due():
            raised_at.append(now)
            overtaken.raised(POOL)
        now += 0.5
    pauses = [after - before for before, after in itertools.pairwise(raised_at)]
    assert pauses[:5] == [1.0, 2.0, 4.0, 8.0, 16.0]
    assert max(pauses) == pauses[-1] == 600.0


def test_other_pools_do_not_wait_for_its_sake() -> None:
    overtaken = Overtaken(lambda: 0.0)
    overtaken.see(POOL, Version(2, 1))
    overtaken.raised(POOL)
    overtaken.see(POOL, Version(3, 1))
    overtaken.see(OTHER, Version(3, 1))
    assert overtaken.due() == {OTHER: Version(3, 1)}


def test_what_nothing_is_done_about_is_forgotten() -> None:
    overtaken = Overtaken(lambda: 0.0)
    overtaken.see(POOL, Version(2, 1))
    overtaken.dismiss(POOL)
    assert overtaken.due() == {}
