"""A training step of the net that boards measure themselves with: `python arm_step.py OUT` writes loss and weights."""

import json
import sys
from importlib import resources
from pathlib import Path

import numpy as np

from fedprune.model import step_contract
from fedprune.runtime.session import OnnxSession


def main(out: Path) -> None:
    assets = resources.files("fedprune_device") / "assets"
    reference = json.loads((assets / "probe.json").read_text())
    random = np.random.default_rng(0)
    tensors = {n: (0.1 * random.standard_normal(shape)).astype(np.float32) for n, shape in reference["tensors"].items()}
    feeds = {
        step_contract.X: random.standard_normal((reference["batch"], *reference["input_shape"])).astype(np.float32),
        step_contract.Y: random.integers(0, reference["classes"], reference["batch"]),
        step_contract.LR: np.array(0.1, np.float32),
        step_contract.MOMENTUM: np.array(0.9, np.float32),
        step_contract.WEIGHT_DECAY: np.array(0, np.float32),
    }
    feeds |= tensors | {step_contract.momentum_name(n): np.zeros_like(v) for n, v in tensors.items()}
    np.savez(out, **OnnxSession((assets / "probe_training-cpu.onnx").read_bytes(), threads=1, training=True).run(feeds))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
