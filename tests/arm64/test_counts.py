"""Instructions of training steps, compared with the benchmark's last counts."""

from __future__ import annotations

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
    kept = {n: recorded["setting"][n] for n in ("onnxruntime", "numpy")}
    assert kept == {n: versions()[n] for n in kept}, "other wheels: run python -m benchmarks.arm"
    before = recorded["counts"][PROCESSOR]["ours"]
    with counted_board(NETS, (DENSITY,), ("ours",)) as board:
        found = count(replace(board, processor=PROCESSOR), "ours", rows, BATCH, 240)
    grown = {r: found[r]["instructions"] / before[r]["instructions"] for r in rows}
    assert max(grown.values()) <= 1 + MARGIN, grown
    assert min(grown.values()) >= 1 - MARGIN, f"fewer: run python -m benchmarks.arm and commit its results ({grown})"
