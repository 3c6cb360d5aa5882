"""Signals: that something has changed. Given by the cache and others, awaited by whoever leads."""

from collections.abc import Callable

from evenhand_operator.debounce import Debounce
from evenhand_operator.settings import Settings

_STATUS_QUIET_SECONDS, _STATUS_LONGEST_SECONDS = 0.02, 0.2
_STORE_QUIET_SECONDS, _STORE_LONGEST_SECONDS = 1.0, 5.0
_STORE_REST_SECONDS = 30.0  # each write is fetched by the kubelet of every pod that mounts it


class Signals:
    """Of one process.

    Attributes:
        changed: what engines are to enforce, or which they are, may be another.
        statuses: a status may have to be another.
        stored: what is stored may have to be another.
        on_gap: called when the watch has begun anew, so that deletions may have been missed.
        is_stale: whether the policies have to be compiled anew, for whoever does that to take back.
        num_changes: how often that was said since.
    """

    def __init__(self, settings: Settings) -> None:
        self.changed = Debounce(settings.quiet_seconds, settings.longest_wait_seconds, settings.commit_patience)
        self.statuses = Debounce(_STATUS_QUIET_SECONDS, _STATUS_LONGEST_SECONDS)
        self.stored = Debounce(_STORE_QUIET_SECONDS, _STORE_LONGEST_SECONDS, rest=_STORE_REST_SECONDS)
        self.on_gap: Callable[[], None] = lambda: None
        self.is_stale = True
        self.num_changes = 0

    def documents_changed(self) -> None:
        """What decides about documents is another."""
        self.is_stale = True
        self.num_changes += 1
        self.changed.signal()

    def pods_changed(self) -> None:
        """Which pods are ready is another."""
        self.changed.signal()

    def statuses_changed(self) -> None:
        """A status is another."""
        self.statuses.signal()

    def gap_seen(self) -> None:
        """Events may be missing."""
        self.on_gap()
