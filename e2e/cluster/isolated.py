"""Runs a command in namespaces of its own, as a node needs them; as it is where this machine has none for us, so that tests can say why they are skipped."""

import os
import subprocess
import sys
import tempfile

NAMESPACES = ("unshare", "--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc")
"""What a node runs in: its network leads nowhere, and whatever ends it, the kernel ends every container, mount and bridge."""

PROBE = """
test -r /dev/kmsg
for groups in /sys/fs/cgroup/memory /sys/fs/cgroup; do
  if test -d $groups; then mkdir $groups/evenhand-probe; rmdir $groups/evenhand-probe; break; fi
done
mkdir lower upper work merged
mount -t overlay overlay -o lowerdir=lower,upperdir=upper,workdir=work merged
"""
"""What a kubelet and containerd will do, in a folder of its own."""


def forbidden() -> str:
    """Why this machine lets no node run, whatever is built, or nothing."""
    if os.geteuid() or not sys.platform.startswith("linux"):
        return "a node needs root on Linux"
    with tempfile.TemporaryDirectory() as scratch:
        probe = [*NAMESPACES, "sh", "-e", "-c", PROBE]
        try:
            done = subprocess.run(
                probe, cwd=scratch, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=60
            )
        except FileNotFoundError:
            return "a node needs unshare of util-linux"
    return f"this machine lets no node run: {done.stderr.strip()}" if done.returncode else ""


if __name__ == "__main__":
    command = sys.argv[1:] if forbidden() else [*NAMESPACES, *sys.argv[1:]]
    os.execvp(command[0], command)
