"""Everything that computes on an NVIDIA GPU, checked and timed on a real one: `python -m benchmarks.gpu`.

It needs onnxruntime-gpu and a torch with CUDA, no network, and at most eight minutes; what the machine lacks is
skipped, by name. Results are written after each part, so that a time-out loses none. `--dry` goes through all parts on
the processor, as small as they can be, and writes nothing. The command ends with 1 if a check failed or nothing
was measured.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onnxruntime
import torch

from benchmarks.gpu.board import measure_board
from benchmarks.gpu.engines import measure_engines
from benchmarks.gpu.fleet import measure_fleet
from benchmarks.gpu.machine import Machine, card
from benchmarks.gpu.placement import PROVIDER
from benchmarks.gpu.predictions import measure_predictions
from benchmarks.gpu.steps import measure_steps
from benchmarks.harness import save, setting

# A run's limit: eight minutes, less the imports.
SECONDS = 450.0

# What tells a part's rows apart.
NAMES = ("net", "density", "precision", "tier", "case", "check")

# The key of each part's rows in the results, in the order in which they run.
PARTS: dict[str, Callable[[Machine], Iterator[dict[str, Any]]]] = {
    "rows": measure_steps,
    "board": measure_board,
    "fleet": measure_fleet,
    "predictions": measure_predictions,
    "engines": measure_engines,
}


def run_parts(machine: Machine, names: list[str], write: Callable[[dict[str, Any]], None]) -> int:
    """Run parts; `write` gets all results so far after each row. Returns the exit code."""
    body: dict[str, Any] = {"failed": [], "skipped": machine.skipped}
    for name in names:
        body[name] = []
        try:
            for row in PARTS[name](machine):
                print(json.dumps({"part": name, **row}), flush=True)
                body[name].append(row)
                if not row["ok"]:
                    body["failed"].append(f"{name}: {' '.join(str(row[key]) for key in NAMES if key in row)}")
                write(body)
        except Exception as error:  # noqa: BLE001 - the other parts can still run, and a card is lent for minutes
            traceback.print_exc()
            body["failed"].append(f"{name} ({type(error).__name__}: {str(error)[:300]})")
        write(body)
    if not any(body[name] for name in names):
        body["failed"].append("nothing was measured")
    for line in machine.skipped:
        print(f"skipped: {line}", file=sys.stderr)
    for line in body["failed"]:
        print(f"FAILED: {line}", file=sys.stderr)
    return 1 if body["failed"] else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dry", action="store_true", help="on the processor, as small as possible, nothing written")
    parser.add_argument("--part", choices=PARTS, action="append", help="only these parts; writes nothing without --out")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the results there")
    options = parser.parse_args()
    names = options.part or list(PARTS)
    machine = Machine(dry=options.dry, end=time.monotonic() + SECONDS)
    out = options.out or (None if options.dry or options.part else "gpu")
    about: dict[str, Any] = {}
    if not options.dry:
        if PROVIDER not in onnxruntime.get_available_providers() or not torch.cuda.is_available():
            lacks = "a CUDA build of torch" if not torch.cuda.is_available() else "onnxruntime-gpu"
            print(f"error: this machine lacks {lacks}; `--dry` needs neither", file=sys.stderr)
            return 1
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        about = setting("torch") | {"onnxruntime": onnxruntime.__version__} | card()

    def write(body: dict[str, Any]) -> None:
        if out is not None:
            save(out, {"setting": about, **body})

    return run_parts(machine, names, write)


if __name__ == "__main__":
    sys.exit(main())
