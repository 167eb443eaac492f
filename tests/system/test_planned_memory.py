"""Plans that divide batches instead of models, on real nets, and one carried out within its board's memory."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fedprune_export.cli.main import main as export

pytestmark = pytest.mark.torch

ZERO = "raspberry-pi-zero-2w"
TRAIN = """
import sys
from fedprune_device.cli.main import main
code = main(sys.argv[1:])
print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")))
sys.exit(code)
"""


def test_training_stays_within_the_plans_memory(tmp_path: Path) -> None:
    bundle, samples = tmp_path / "bundle", tmp_path / "samples.npz"
    assert export(["support.nets.small_nets:unet", "--target", ZERO, "--labels", "multi", "--out", str(bundle)]) == 0
    made = json.loads((bundle / "report.json").read_text())["plan"]
    assert made["density"] == 1
    rng = np.random.default_rng(0)
    x = rng.standard_normal((1000, 3, 64, 64), dtype=np.float32)
    np.savez(samples, x=x, y=rng.integers(0, 2, (1000, 64 * 64)).astype(np.uint8))
    command = [sys.executable, "-c", TRAIN, "train", "--bundle", bundle, "--data", samples, "--out", tmp_path / "out"]
    command += ["--threads", "1", "--set", "max_steps=2"]
    run = subprocess.run(
        list(map(str, command)),
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
    )
    assert run.returncode == 0, run.stderr
    peak = 1024 * int(run.stdout.rpartition("VmHWM:")[2].split()[0])
    assert peak <= next(m["limit"] for m in made["limits"] if m["name"] == "memory")
