"""From an empty cluster to the first answer: `kubectl apply -k` of the dev overlay with two engines on a real node, images present.

Then an uninstallation, and once more. In namespaces of its own (root; `make node` builds what it needs).
"""

import os
import statistics
import sys
import tempfile
from pathlib import Path

import common

from cluster import images, node_build
from cluster.node import isolation
from harness.node_installation import NodeInstallation

ISOLATED = ["unshare", "--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]


def run(times: int) -> None:
    with tempfile.TemporaryDirectory() as directory, NodeInstallation(Path(directory)) as installation:
        seconds = []
        for _ in range(times):
            seconds.append(installation.install())
            installation.uninstall()
    sizes = {name: path.stat().st_size / 1e6 for name, path in images.archives().items()}
    rows = [
        [f"kubectl apply to the first answer, median of {times}", f"{statistics.median(seconds):.1f} s"],
        *([f"image {name}, its layers compressed", f"{size:.0f} MB"] for name, size in sizes.items()),
    ]
    common.print_table("Installing on a node that has the images", ["", ""], rows)
    results = {f"image_{name}_mb": round(size) for name, size in sizes.items()}
    common.finish("install", {"install_to_first_token_s": round(statistics.median(seconds), 2), **results})


if __name__ == "__main__":
    options = common.arguments(__doc__).parse_args()
    if reason := node_build.missing():
        sys.exit(reason)
    if isolation():
        os.execvp(ISOLATED[0], [*ISOLATED, sys.executable, *sys.argv])
    run(times=1 if options.quick else 5)
