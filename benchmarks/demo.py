"""README's figures and first picture: one run of the demo.

    python -m benchmarks.demo [FOLDER]

runs `fedprune-server demo`, or takes the folder of a finished one, and keeps its numbers in
`benchmarks/results/demo.json`, of which README's table and curves are made.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.harness import ROOT, setting
from fedprune_server.simulation.results.record import Record
from manual import demo, written


def kept(path: Path) -> dict[str, Any]:
    """A run's record with what README shows of it."""
    run = Record.load(path)
    rounds = tuple(replace(row, device_metrics={}, density={}) for row in run.rounds)
    body: dict[str, Any] = json.loads(replace(run, rounds=rounds, channels={}).to_json())
    return body


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, help="folder of a finished demo (default: runs one)")
    folder = parser.parse_args().folder
    with tempfile.TemporaryDirectory() as scratch:
        if folder is None:
            folder = Path(scratch) / "demo-run"
            command = [sys.executable, "-m", "fedprune_server.cli.main", "demo", "--out", str(folder)]
            subprocess.run(command, check=True)
        names = {"fleet": "metrics.json", "reference": "reference/metrics.json"}
        body = {**setting(), **{name: kept(folder / file) for name, file in names.items()}}
    (ROOT / demo.RESULTS).write_text(json.dumps(body) + "\n", encoding="utf-8")
    for name in written.write(ROOT):
        print(name)


if __name__ == "__main__":
    main()
