"""From an empty cluster to the first answer: two engines by `kubectl apply -k` and by Helm on a real node, images present.

Then an uninstallation, and once more; at last a policy that changes again and again while three engines run: the time from the edit
to a status that says that all three enforce it. In namespaces of its own (root; `make node` builds what it needs).
"""

import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import common
import numpy as np

from cluster import images, isolated, node_build
from cluster.node import isolation
from cluster.own_node import own_node
from harness import node_chart
from harness.helm import Helm
from harness.node_installation import ENGINES, NodeInstallation

ENOUGH = 3


def run(times: int, changes: int) -> None:
    with (
        tempfile.TemporaryDirectory() as scratch,
        own_node(Path(scratch)) as (cluster, node),
        NodeInstallation(cluster, Path(scratch), node) as installation,
    ):
        helm = Helm(Path(scratch, "helm"), cluster.kubeconfig)
        seconds, by_helm = [], []
        for _ in range(times):
            seconds.append(installation.install())
            installation.uninstall()
            by_helm.append(node_chart.install(installation, helm))
            node_chart.uninstall(installation, helm)
        enforced = seconds_to_enforce(installation, changes)
    sizes = {name: path.stat().st_size / 1e6 for name, path in images.archives().items()}
    quantiles = np.percentile(enforced, (50, 99)).tolist()
    rows = [
        [f"kubectl apply to the first answer, median of {times}", f"{statistics.median(seconds):.1f} s"],
        [f"helm install to the first answer, median of {times}", f"{statistics.median(by_helm):.1f} s"],
        [
            f"a policy's edit in force in {ENOUGH} engines, p50 and p99 of {changes}",
            "{:.2f} and {:.2f} s".format(*quantiles),
        ],
        *([f"image {name}, its layers compressed", f"{size:.0f} MB"] for name, size in sizes.items()),
    ]
    common.print_table("Installing on a node that has the images", ["", ""], rows)
    results: dict[str, float] = {f"image_{name}_mb": round(size) for name, size in sizes.items()}
    results |= {f"policy_enforced_p{part}_s": round(found, 2) for part, found in zip((50, 99), quantiles, strict=True)}
    results |= {"helm_to_first_token_s": round(statistics.median(by_helm), 2)}
    common.finish("install", {"install_to_first_token_s": round(statistics.median(seconds), 2), **results})


def seconds_to_enforce(installation: NodeInstallation, changes: int) -> list[float]:
    """From `kubectl patch` to the end of `kubectl wait`."""
    installation.install()
    installation.kubectl("scale", ENGINES, f"--replicas={ENOUGH}")
    installation.wait_serving(ENOUGH)
    seconds = []
    for change in range(changes):
        began = time.monotonic()
        installation.kubectl("patch", "tpol", "chat", "--type=merge", "-p", f'{{"spec": {{"weight": {change + 2}}}}}')
        installation.wait_ready("chat")
        seconds.append(time.monotonic() - began)
    installation.uninstall()
    return seconds


if __name__ == "__main__":
    options = common.arguments(__doc__).parse_args()
    if reason := node_build.missing():
        sys.exit(reason)
    if isolation():
        os.execvp(isolated.NAMESPACES[0], [*isolated.NAMESPACES, sys.executable, *sys.argv])
    run(times=1 if options.quick else 3, changes=10 if options.quick else 60)
