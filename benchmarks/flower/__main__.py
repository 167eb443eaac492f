"""The command: `python -m benchmarks.flower [--clients 10 50] [--kinds ...]`; needs `make build/flower/compared`."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
from synthetic_nets import RESULTS, setting, write

from benchmarks.flower.kills import AT, DEADLINE_S, EPOCHS, KINDS, OURS, THEIRS, calm, observe
from benchmarks.flower.material import Job
from benchmarks.flower.measure import Make, apart, measure
from benchmarks.flower.page import page
from benchmarks.flower.sides import Fedprune, Flower, Model
from benchmarks.swarm.site import find_mosquitto

NAME = "flower"
_ROOT = Path(__file__).parents[2]


def main() -> int:
    """Run what is asked for, and put it into the results."""
    options = arguments().parse_args()
    environment = options.environment.resolve()
    path = RESULTS / f"{NAME}.json"
    found: dict[str, Any] = json.loads(path.read_text()) if options.add and path.exists() else {}
    found = {"rows": [], "kills": [], **found, "setting": _about(environment), "epochs": Job(1).epochs}
    found |= {"kill_epochs": EPOCHS, "deadline_s": DEADLINE_S, "kill_round": AT}
    with TemporaryDirectory() as name:
        folder = Path(name)
        for clients in options.clients:
            job = Job(clients, options.rounds)
            rows = _sizes(folder, job, options.sides, environment, options.seconds)
            found["rows"] = _put(found["rows"], rows, ("clients", "side"))
        base = calm(folder / "calm", Fedprune) if options.kinds else {}
        for title, kinds in (("fedprune", OURS), ("Flower", THEIRS)):
            rows = [
                observe(folder / f"{title}-{i}", _make(title, environment, "database" in kind), kind, base)
                for i, kind in enumerate(kinds)
                if kind in options.kinds and title in options.sides
            ]
            found["kills"] = _put(found["kills"], rows, ("kind", "side"))
    found["kills"].sort(key=lambda k: (list(KINDS).index(k["kind"]), k["side"] == "Flower"))
    found["rows"].sort(key=lambda r: (r["clients"], r["side"] == "Flower"))
    write(NAME, found, page(found))
    return 0


def arguments() -> argparse.ArgumentParser:
    """What the command may be told."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.flower", description=__doc__)
    parser.add_argument("--clients", type=int, nargs="*", default=[10, 50], metavar="N", help="default: 10 50")
    parser.add_argument("--rounds", type=int, default=10, metavar="N", help="default: 10")
    parser.add_argument(
        "--seconds",
        type=float,
        default=1800.0,
        metavar="S",
        help="end a run early, after a whole round (default: 1800)",
    )
    parser.add_argument("--kinds", nargs="*", default=list(KINDS), choices=KINDS, metavar="KIND", help="kills to run")
    parser.add_argument("--sides", nargs="*", default=["fedprune", "Flower"], choices=["fedprune", "Flower"])
    parser.add_argument("--add", action="store_true", help="keep what the results have of other sizes and kinds")
    parser.add_argument(
        "--environment", type=Path, default=_ROOT / "build/flower", metavar="DIR", help="Flower's own environment"
    )
    return parser


def _sizes(folder: Path, job: Job, sides: list[str], environment: Path, seconds: float) -> list[dict[str, Any]]:
    rows, models = list[dict[str, Any]](), list[Model]()
    for side in sides:
        row, model = measure(folder / f"{side}-of-{job.clients}", job, _make(side, environment), seconds)
        print(json.dumps(row), flush=True)
        rows.append(row)
        models.append(model)
    if len({row["rounds"] for row in rows}) == 1 and len(models) > 1:
        rows[0]["apart"] = apart(*models)
        rows[0]["all_counted"] = all(c == job.clients for r in rows for c in r["counted"])
    return rows


def _make(side: str, environment: Path, database: bool = False) -> Make:
    return Fedprune if side == "fedprune" else partial(Flower, environment=environment, database=database)


def _put(rows: list[dict[str, Any]], new: list[dict[str, Any]], keys: tuple[str, str]) -> list[dict[str, Any]]:
    """Rows with new ones in place of those of the same keys."""
    names = {tuple(r[k] for k in keys) for r in new}
    return [r for r in rows if tuple(r[k] for k in keys) not in names] + new


def _about(environment: Path) -> dict[str, Any]:
    asked = "from importlib.metadata import version; print(version('flwr'))"
    flwr = subprocess.run([environment / "bin/python", "-c", asked], capture_output=True, text=True, check=True)
    help_text = subprocess.run([find_mosquitto(), "-h"], capture_output=True, text=True).stdout
    return {
        **setting("onnxruntime", "paho-mqtt"),
        "flwr": flwr.stdout.strip(),
        "mosquitto": help_text.split()[2],
        "numpy": np.__version__,
    }


if __name__ == "__main__":
    sys.exit(main())
