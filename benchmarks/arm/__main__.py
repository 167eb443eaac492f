"""Instructions of training steps and predictions on Arm processors, ours and torch's: `python -m benchmarks.arm`.

The wheels that boards run are executed by qemu's user-mode emulator, whose plugin counts. Counts are exact, and the
same on any machine. What they don't say: cycles. Caches, memory and the number of instructions that a core finishes
per cycle decide how long a count takes; the page has bounds of both kinds.

Needs Debian's qemu-user, qemu-user-static, proot, mmdebstrap and gcc. A processor takes about a quarter of an hour.
"""

from __future__ import annotations

import json
import statistics
import subprocess
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from benchmarks.arm.counting import (
    BATCH,
    DENSITIES,
    NETS,
    PREDICTING,
    TRAINING,
    count,
    counted_board,
    row,
    tool,
    versions,
)
from benchmarks.harness import RESULTS, parser, save, setting

_TIMEOUT_S = 3600
"""For one engine on one processor."""

# Board, its clock in GHz, instructions that it can begin and bytes that it can load and store in a cycle. Clocks:
# hardware_profiles/. Widths: Arm's software optimisation guides of the cores; of the A53, which has none, its technical
# reference manual (dual issue, one 64-bit load or store a cycle).
PROCESSORS = {
    "cortex-a53": ("Raspberry Pi Zero 2 W", 1.0, 2, 8),
    "cortex-a72": ("Raspberry Pi 4", 1.8, 3, 32),
    "cortex-a76": ("Raspberry Pi 5", 2.4, 4, 32),
    "cortex-a78": ("Jetson Orin Nano", 1.5, 4, 48),
}
COMPARED = (("ours", "torch"), ("float32", "plain"), ("int8", "plain"))


def compared(counts: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Instructions of one engine by another's: geometric means and the worst rows, by processor."""
    rows = []
    for engine, reference in COMPARED:
        for processor in (name for name in PROCESSORS if name in counts):
            ours, theirs = (counts[processor].get(name, {}) for name in (engine, reference))
            ratios = {
                case: ours[case]["instructions"] / theirs[case]["instructions"] for case in ours if case in theirs
            }
            if ratios:
                worst = max(ratios, key=lambda case: ratios[case])
                mean = statistics.geometric_mean(ratios.values())
                about = {"engine": engine, "processor": processor, "cases": len(ratios), "mean": mean}
                rows.append({**about, "worst": ratios[worst], "worst_case": worst})
    return rows


def flat(counts: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Instructions and bytes of all steps, with what bounds their time, and of all predictions."""
    steps, predictions = [], []
    for processor, (_, ghz, width, line) in PROCESSORS.items():
        engines = counts.get(processor, {})
        for case in engines.get("ours", {}):
            about = dict(zip(("net", "density"), case.split("@"), strict=True)) | {"processor": processor}
            found = {name: cases[case] for name, cases in engines.items() if case in cases}
            counted = {name: each["instructions"] for name, each in found.items()}
            moved = {f"{name}_bytes": each["bytes"] for name, each in found.items()}
            issue_ms, memory_ms = counted["ours"] / width / ghz / 1e6, moved["ours_bytes"] / line / ghz / 1e6
            steps.append({**about, **counted, **moved, "issue_ms": issue_ms, "memory_ms": memory_ms})
            predictions.append({**about, **counted})
    return {"steps": steps, "predictions": predictions}


def main() -> None:
    command = parser(__doc__)
    command.add_argument("--processors", default=",".join(PROCESSORS), help="only these, by commas")
    command.add_argument("--engines", default=",".join((*TRAINING, *PREDICTING)), help="only these, by commas")
    options = command.parse_args()
    emulator = subprocess.run([tool("qemu-aarch64", "qemu-user"), "--version"], capture_output=True, text=True)
    about = setting() | versions() | {"emulator": emulator.stdout.splitlines()[0].split(" (")[0]}
    stored = RESULTS / "arm.json"
    counts: dict[str, Any] = json.loads(stored.read_text())["counts"] if stored.is_file() else {}
    engines, rows = options.engines.split(","), [row(net, density) for net in NETS for density in DENSITIES]
    with counted_board(NETS, DENSITIES, engines) as board:
        for name in options.processors.split(","):
            for engine in engines:
                found = count(replace(board, processor=name), engine, rows, BATCH, _TIMEOUT_S)
                counts[name] = counts.get(name, {}) | {engine: found}
                body = {"setting": about, "batch": BATCH, "counts": counts}
                save(options.out or "arm", {**body, "compared": compared(counts), **flat(counts)})


if __name__ == "__main__":
    main()
