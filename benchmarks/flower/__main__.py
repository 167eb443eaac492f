"""The same job by fedprune and by Flower, as real processes: `python -m benchmarks.flower [--clients 10 50]`.

Flower's environment: `make build/flower/installed`, then
`build/flower/bin/pip install onnxruntime safetensors paho-mqtt tomli`.
"""

from __future__ import annotations

import subprocess
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.flower.material import Job
from benchmarks.flower.measure import Make, apart, measure
from benchmarks.flower.sides import Fedprune, Flower, Model
from benchmarks.harness import ROOT, parser, save, setting
from benchmarks.swarm.site import find_mosquitto


def main() -> None:
    command = parser(__doc__)
    command.add_argument("--clients", type=int, nargs="*", default=[10, 50], metavar="N", help="default: 10 50")
    command.add_argument("--rounds", type=int, default=10, metavar="N", help="default: 10")
    command.add_argument("--seconds", type=float, default=1800.0, metavar="S", help="end a run early (default: 1800)")
    command.add_argument("--sides", nargs="*", default=["fedprune", "Flower"], choices=["fedprune", "Flower"])
    options = command.parse_args()
    environment = ROOT / "build/flower"
    rows: list[dict[str, Any]] = []
    with TemporaryDirectory() as name:
        for clients in options.clients:
            job, models = Job(clients, options.rounds), list[Model]()
            for side in options.sides:
                make: Make = Fedprune if side == "fedprune" else partial(Flower, environment=environment)
                row, model = measure(Path(name) / f"{side}-of-{clients}", job, make, options.seconds)
                rows.append(row)
                models.append(model)
            if len(models) > 1 and rows[-1]["rounds"] == rows[-2]["rounds"]:
                rows[-2]["apart"] = apart(*models)
    save(options.out or "flower", {"setting": _about(environment), "epochs": Job(1).epochs, "rows": rows})


def _about(environment: Path) -> dict[str, Any]:
    asked = "from importlib.metadata import version; print(version('flwr'))"
    flwr = subprocess.run([environment / "bin/python", "-c", asked], capture_output=True, text=True, check=False)
    help_text = subprocess.run([find_mosquitto(), "-h"], capture_output=True, text=True, check=False).stdout
    return {**setting("onnxruntime", "paho-mqtt"), "flwr": flwr.stdout.strip(), "mosquitto": help_text.split()[2]}


if __name__ == "__main__":
    main()
