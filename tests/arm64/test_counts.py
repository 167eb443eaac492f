"""Instructions of training steps, compared with the benchmark's last counts."""

import json
from dataclasses import replace

from benchmarks.arm.counting import BATCH, count, counted_board, row, versions
from support.paths import ROOT

PROCESSOR = "cortex-a72"
NETS, DENSITY = ("lenet", "resnet20_bn", "mobilenet_v2"), 0.25
MARGIN = 0.03


def test_no_step_takes_more_instructions_than_before() -> None:
    rows = [row(net, DENSITY) for net in NETS]
    recorded = json.loads((ROOT / "benchmarks/results/arm.json").read_text())
    recorded_versions = {n: recorded["setting"][n] for n in ("onnxruntime", "numpy")}
    assert recorded_versions == {n: versions()[n] for n in recorded_versions}, (
        "other wheels: run python -m benchmarks.arm"
    )
    before = recorded["counts"][PROCESSOR]["ours"]
    with counted_board(NETS, (DENSITY,), ("ours",)) as board:
        counts = count(replace(board, processor=PROCESSOR), "ours", rows, BATCH, 240)
    growth = {r: counts[r]["instructions"] / before[r]["instructions"] for r in rows}
    assert max(growth.values()) <= 1 + MARGIN, growth
    assert min(growth.values()) >= 1 - MARGIN, f"fewer: run python -m benchmarks.arm and commit its results ({growth})"
