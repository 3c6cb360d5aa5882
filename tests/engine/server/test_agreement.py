"""The real engine, by HTTP, does what the simulator says: `make bench-agreement` on a tiny model.

Only what does not depend on the machine's speed is asserted: what each step computes. The tenants' requests differ in
length, so equal steps are equal turns; when a client reads of them is up to the machine.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

BENCHMARK = Path(__file__).parents[3] / "benchmarks" / "agreement.py"
CONTEXT = 2**17  # so that the prompt which fills the cache takes seconds, while the others queue up behind it


def test_every_step_of_the_real_engine_is_the_simulated_one(model_dir: Path, tmp_path: Path) -> None:
    model = shutil.copytree(model_dir, tmp_path / "model")
    config = json.loads((model / "config.json").read_text()) | {"max_position_embeddings": CONTEXT}
    (model / "config.json").write_text(json.dumps(config))
    command = [sys.executable, str(BENCHMARK), "--quick", "--model", str(model), "--kv-cache-memory-bytes", "24M"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])["results"]
    assert found["num_steps"]["real"] == found["num_steps"]["simulated"] == found["num_steps_equal"] > 100
    assert found["ttft_order"]["simulated"] == ["large", "middle", "small"]
    assert found["preemptions_simulated"] == 0, "else the order would depend on the machine's speed"
