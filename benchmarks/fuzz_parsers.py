"""Damaged inputs through every parser of outside bytes: `python benchmarks/fuzz_parsers.py --inputs 1000000`.

The parsers are those of `tests/parsers_of_*.py`. Each runs in a process of its own with bounded memory, which is given
inputs of a fixed seed: bytes and texts that are cut, spliced and inflated, and JSON whose structure is damaged. An
input may be taken or refused in one of our errors. Anything else is a finding: another exception, a dead process, more
memory than the parser is allowed, a message that fills a log, or more than `SECONDS` for one input.
"""

from __future__ import annotations

import argparse
import logging
import mmap
import multiprocessing
import os
import resource
import shutil
import signal
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from synthetic_nets import setting, write

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from support.faults.parser_fuzzer import Tally, fuzz
from support.faults.parser_target import Target, scratch
from support.faults.parsers_of_boards import board_targets
from support.faults.parsers_of_files import file_targets
from support.faults.parsers_of_messages import wire_targets
from support.faults.parsers_of_setup import setup_targets

MEMORY = 4 * 2**30
"""Address space of a process, most of which is libraries."""

SECONDS = 2.0
"""What one input may take; a process that hangs is ended after ten times that."""

_PIECE = 500


def child(target: Target, first: int, count: int, place: mmap.mmap, answers: Any) -> None:
    """Run a parser's inputs and say what became of them."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    before = _resident()
    tally = Tally()
    for start in range(first, first + count, _PIECE):
        place[:8] = start.to_bytes(8, "little")
        fuzz(target, start, min(_PIECE, first + count - start), tally)
    answers.put({**asdict(tally), "refused": dict(tally.refused), "grown": _resident() - before})


def _resident() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def run(target: Target, first: int, count: int) -> dict[str, Any]:
    """A parser's inputs in a process of their own; one that dies or hangs is a finding."""
    place = mmap.mmap(-1, 8)
    context = multiprocessing.get_context("fork")
    answers = context.SimpleQueue()
    process = context.Process(target=child, args=(target, first, count, place, answers))
    begun = time.monotonic()
    process.start()
    moved_at, at = begun, b""
    while process.is_alive() and answers.empty():
        process.join(0.02)
        if place[:8] != at:
            moved_at, at = time.monotonic(), place[:8]
        if time.monotonic() - moved_at > 10 * SECONDS + _PIECE * 0.1:
            os.kill(process.pid or 0, signal.SIGKILL)
    row = {} if answers.empty() else answers.get()
    process.join()
    row |= {"name": target.name, "wall": time.monotonic() - begun}
    if "inputs" not in row:
        where = int.from_bytes(place[:8], "little")
        row |= asdict(Tally(inputs=where - first)) | {"grown": 0, "refused": {}}
        row["findings"] = {f"the process ended with {process.exitcode} after this one": where}
    if row["slowest"][0] > SECONDS:
        row["findings"][f"{row['slowest'][0]:.1f} s for one input"] = row["slowest"][1]
    return row


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--inputs", type=int, default=1_000_000, help="of all parsers together")
    parser.add_argument("--first", type=int, default=0, help="number of each parser's first input")
    parser.add_argument("--only", default="", help="parsers whose names hold this")
    parser.add_argument("--dry", action="store_true", help="print findings, write no page")
    arguments = parser.parse_args()
    logging.disable(logging.CRITICAL)
    begun = time.monotonic()
    targets = [
        t for t in (*wire_targets(), *file_targets(), *board_targets(), *setup_targets()) if arguments.only in t.name
    ]
    shares = sum(t.share for t in targets)
    rows = []
    try:
        for target in targets:
            count = -int(-arguments.inputs * target.share // shares)
            rows.append(run(replace(target), arguments.first, count))
            for what, number in rows[-1]["findings"].items():
                print(f"finding: {target.name}, input {number}: {what}", flush=True)
    finally:
        shutil.rmtree(scratch(), ignore_errors=True)
    wall = time.monotonic() - begun
    total = sum(r["inputs"] for r in rows)
    print(f"{total} inputs in {wall:.0f} s, {sum(len(r['findings']) for r in rows)} findings")
    if not arguments.dry:
        _write(arguments, rows, total, wall)


def _write(arguments: argparse.Namespace, rows: list[dict[str, Any]], total: int, wall: float) -> None:
    about = setting("numpy", "cryptography", "pillow")
    lines = [
        "# Fuzzing the parsers",
        "",
        (
            f"{about['date']}, {about['cpu']}, Python {about['python']}, numpy {about['numpy']}, cryptography "
            f"{about['cryptography']}, Pillow {about['pillow']}. "
            f"`python benchmarks/fuzz_parsers.py --inputs {arguments.inputs}`"
        ),
        "",
        (
            f"{total:,} damaged inputs (each parser's from number {arguments.first}) through {len(rows)} parsers in "
            f"{wall / 60:.1f} minutes on one core; {sum(len(r['findings']) for r in rows)} findings. Every parser runs "
            f"in a process of its own with {MEMORY // 2**30} GiB of address space. Memory is measured at every 40th "
            "input: the most that one took, beside what an input of that size is allowed to take; and by how much the "
            "whole process grew. The time is the processor's."
        ),
        "",
        "| parser | inputs | taken | refused | mean | slowest | memory | allowed | process grew |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for r in sorted(rows, key=lambda r: str(r["name"])):
        used, allowed, _, _ = r["peak"]
        mean = r["seconds"] / max(1, r["inputs"])
        kilo = f"{r['slowest'][0] * 1e3:.1f} ms | {used / 1e3:,.0f} kB | {allowed / 1e3:,.0f} kB"
        lines.append(
            f"| {r['name']} | {r['inputs']:,} | {r['taken']:,} | {sum(r['refused'].values()):,} | "
            f"{mean * 1e6:.0f} µs | {kilo} | {r['grown'] / 1e6:.1f} MB |"
        )
    write("fuzz_parsers", {"setting": about, "inputs": total, "wall_s": wall, "parsers": rows}, "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
