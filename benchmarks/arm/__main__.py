"""Instructions of training steps and predictions on Arm processors, ours and torch's: `python -m benchmarks.arm`.

The wheels that boards run are executed by qemu's user-mode emulator, whose plugin counts. Counts are exact, and the
same on any machine. What they don't say: cycles. Caches, memory and the number of instructions that a core finishes
per cycle decide how long a count takes; the page has bounds of both kinds.

Needs Debian's qemu-user, qemu-user-static, proot, mmdebstrap and gcc. A processor takes about a quarter of an hour.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.arm.counting import (
    BATCH,
    BOOKWORM,
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

_MOST_SECONDS = 3600
"""For one engine on one processor."""


@dataclass(frozen=True)
class Processor:
    """A board's processor, and what bounds its speed.

    Args:
        name: As `support.processes.arm_board` names it.
        board: Which has it.
        hertz: Its clock there.
        width: Instructions that it can begin in a cycle.
        line: Bytes that it can load and store in a cycle.
    """

    name: str
    board: str
    hertz: float
    width: int
    line: int


# Clocks: hardware_profiles/. Widths: Arm's software optimisation guides of the cores; of the A53, which has none, its
# technical reference manual (dual issue, one 64-bit load or store a cycle).
PROCESSORS = (
    Processor("cortex-a53", "Raspberry Pi Zero 2 W", 1.0e9, 2, 8),
    Processor("cortex-a72", "Raspberry Pi 4", 1.8e9, 3, 32),
    Processor("cortex-a76", "Raspberry Pi 5", 2.4e9, 4, 32),
    Processor("cortex-a78", "Jetson Orin Nano", 1.5e9, 4, 48),
)


def ratios(counts: Mapping[str, Any], engine: str, reference: str) -> dict[str, float]:
    """Instructions of one engine by another's, by net and width; nothing of what wasn't counted."""
    ours, theirs = counts.get(engine, {}), counts.get(reference, {})
    return {c: ours[c]["instructions"] / theirs[c]["instructions"] for c in ours if c in theirs}


def comparison(found: Mapping[str, Any], engine: str, reference: str) -> str:
    """Geometric means and the worst rows, by processor."""
    lines = ["| processor | cases | geometric mean | worst |", "|---|---:|---:|---|"]
    for processor in PROCESSORS:
        held = ratios(found.get(processor.name, {}), engine, reference)
        if held:
            worst = max(held, key=lambda case: held[case])
            mean = statistics.geometric_mean(held.values())
            lines.append(f"| {processor.name} | {len(held)} | {mean:.2f} | {held[worst]:.2f} ({worst}) |")
    return "\n".join(lines)


def steps(found: Mapping[str, Any]) -> str:
    """Training steps by net, width and processor."""
    lines = ["| processor | net | width | ours, M | torch, M | ratio | ours, MB | torch, MB | issue, ms | memory, ms |"]
    lines.append("|---|---|---:|---:|---:|---:|---:|---:|---:|---:|")
    for processor in PROCESSORS:
        held = found.get(processor.name, {})
        for case, ratio in ratios(held, "ours", "torch").items():
            net, _, density = case.partition("@")
            mine, theirs = held["ours"][case], held["torch"][case]
            issue = 1e3 * mine["instructions"] / processor.width / processor.hertz
            memory = 1e3 * mine["bytes"] / processor.line / processor.hertz
            lines.append(
                f"| {processor.name} | {net} | {density} "
                f"| {mine['instructions'] / 1e6:,.1f} | {theirs['instructions'] / 1e6:,.1f} | {ratio:.2f} "
                f"| {mine['bytes'] / 1e6:,.0f} | {theirs['bytes'] / 1e6:,.0f} | {issue:.1f} | {memory:.1f} |"
            )
    return "\n".join(lines)


def predictions(found: Mapping[str, Any]) -> str:
    """Predictions by net, width and processor."""
    lines = ["| processor | net | width | onnxruntime's, M | float32 | ratio | int8 | ratio |"]
    lines.append("|---|---|---:|---:|---:|---:|---:|---:|")
    for processor in PROCESSORS:
        held = found.get(processor.name, {})
        single, low = ratios(held, "float32", "plain"), ratios(held, "int8", "plain")
        for case in (c for c in single if c in low):
            net, _, density = case.partition("@")
            counts = [held[e][case]["instructions"] / 1e6 for e in PREDICTING]
            lines.append(
                f"| {processor.name} | {net} | {density} | {counts[0]:,.2f} "
                f"| {counts[1]:,.2f} | {single[case]:.2f} | {counts[2]:,.2f} | {low[case]:.2f} |"
            )
    return "\n".join(lines)


def page(about: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    bounds = "\n".join(
        f"| {p.name} | {p.board} | {p.hertz / 1e9:g} | {p.width} | {p.line} |" for p in PROCESSORS if p.name in found
    )
    return f"""# Instructions on Arm

{about["date"]}; {about["emulator"]}; Python {BOOKWORM.python}, onnxruntime {about["onnxruntime"]},
numpy {about["numpy"]}, torch {about["torch"]} (wheels for 64-bit Arm). `python -m benchmarks.arm`

Instructions of one thread, counted by an emulator: exact, and the same on any machine. One training step is SGD with
momentum and weight decay on {BATCH} samples; ours is one graph for all widths, torch's is eager. A count isn't a time.
Cores finish different numbers of instructions per cycle, and wait for memory; two libraries with the same count may
differ in both; [times on x86](step.md) are no shorter than torch's. Ratios are ours to the other's: below 1 ours takes
fewer. qemu has no Cortex-A78: its rows are the A76's instructions, with a /proc/cpuinfo that names an A78.

## A training step compared with torch's

{comparison(found, "ours", "torch")}

## A prediction compared with onnxruntime's

One sample. *onnxruntime's*: torch's export of the same submodel, weights as constants, all of onnxruntime's
optimisations.

Float32:

{comparison(found, "float32", "plain")}

Int8, compared with the same float32:

{comparison(found, "int8", "plain")}

## Steps

*M*: millions of instructions. *MB*: what loads and stores move between registers and caches or memory. No step can be
faster than the larger of two bounds: *issue*, all instructions at the most that the core begins in a cycle, and
*memory*, all these bytes at the most that it loads and stores in a cycle. Caches that miss make it slower.

| processor | board | GHz | instructions a cycle | bytes a cycle |
|---|---|---:|---:|---:|
{bounds}

{steps(found)}

## Predictions

Millions of instructions.

{predictions(found)}
"""


def main() -> None:
    from synthetic_nets import RESULTS, setting, write

    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.arm", description="Count instructions on emulated Arm processors."
    )
    parser.add_argument("--processors", default=",".join(p.name for p in PROCESSORS), help="only these, by commas")
    parser.add_argument("--engines", default=",".join((*TRAINING, *PREDICTING)), help="only these, by commas")
    parser.add_argument("--page", action="store_true", help="count nothing, write the page of what there is")
    options = parser.parse_args()
    emulator = subprocess.run([tool("qemu-aarch64", "qemu-user"), "--version"], capture_output=True, text=True)
    about = setting() | versions() | {"emulator": emulator.stdout.splitlines()[0].split(" (")[0]}
    known = RESULTS / "arm.json"
    found: dict[str, Any] = json.loads(known.read_text())["counts"] if known.is_file() else {}
    engines = options.engines.split(",")
    if not options.page:
        rows = [row(net, density) for net in NETS for density in DENSITIES]
        with counted_board(NETS, DENSITIES, engines) as board:
            for name in options.processors.split(","):
                for engine in engines:
                    counts = count(replace(board, processor=name), engine, rows, BATCH, _MOST_SECONDS)
                    found[name] = found.get(name, {}) | {engine: counts}
                    write("arm", {"setting": about, "batch": BATCH, "counts": found}, page(about, found))
    write("arm", {"setting": about, "batch": BATCH, "counts": found}, page(about, found))


if __name__ == "__main__":
    main()
