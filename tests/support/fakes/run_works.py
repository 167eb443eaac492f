"""Work for tests of many runs; other processes import it."""

import json
import os
import signal
from pathlib import Path

from fedprune.core.errors import PlanError
from fedprune.core.rng import keyed_generator
from fedprune_server.simulation.runs import Progress, RunSpec


def draw_numbers(run: RunSpec, folder: Path, report: Progress) -> None:
    """Draws numbers, or fails in the way that the settings say; counts how often it was called."""
    calls = folder / "calls"
    calls.write_text(calls.read_text() + "x" if calls.exists() else "x")
    report(0.5, "half")
    kind = run.settings.get("fail")
    if kind == "refused":
        raise PlanError("no device can take part", hint="Try another.")
    if kind == "broken":
        raise ZeroDivisionError("by nothing")
    if kind == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    numbers = keyed_generator(run.settings["seed"], run.name).standard_normal(3)
    (folder / "numbers.json").write_text(json.dumps(numbers.tolist()))
