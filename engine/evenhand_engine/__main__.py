"""`evenhand`: the command line, and before all that it imports what a signal does meanwhile."""

import sys

from evenhand_engine.signals import leave_at_once

_SERVERS = ("serve", "sidecar")


def main() -> None:
    if sys.argv[1:2] and sys.argv[1] in _SERVERS:
        leave_at_once()  # they take long to import, and are stopped by supervisors
    from evenhand_engine.commands.cli import main as run

    run()


if __name__ == "__main__":
    main()
