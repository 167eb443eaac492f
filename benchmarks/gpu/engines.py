"""Engines: the acceptance of TensorRT, where it is installed."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.gpu.machine import Machine
from benchmarks.harness import ROOT
from benchmarks.step_nets import network
from fedprune_export.cli.main import main as export
from fedprune_export.importing import export_torch


def measure_engines(machine: Machine) -> Iterator[dict[str, Any]]:
    """A row for each check of the acceptance: build, restart, new weights, damage, time-out, training."""
    if machine.dry:
        machine.skip("engines", "dry run")
        return
    if find_spec("tensorrt") is None:
        machine.skip("engines", "not installed: tensorrt")
        return
    if not list(machine.in_time(["engines"], 40.0)):
        return
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        (folder / "model.onnx").write_bytes(export_torch(network("resnet20_bn")))
        export([str(folder / "model.onnx"), "--target", "jetson-orin-nano", "--out", str(folder / "bundle")])
        command = [sys.executable, str(ROOT / "examples" / "jetson_acceptance.py"), "--bundle", "bundle"]
        with (folder / "log").open("w") as log:
            try:
                subprocess.run(command, cwd=folder, stdout=log, stderr=log, timeout=machine.seconds_left())
            except subprocess.TimeoutExpired:
                machine.skip("the rest of the acceptance", "no time left")
        yield from acceptance_rows((folder / "log").read_text())


def acceptance_rows(text: str) -> list[dict[str, Any]]:
    """A row for each check. Output without any is an error, and a row of its own."""
    rows = []
    for line in text.splitlines():
        if line.startswith(("ok    ", "FAIL  ")):
            check, _, result = line[6:].partition(": ")
            rows.append({"check": check, "result": result, "ok": line.startswith("ok")})
    return rows or [{"check": "start", "result": text[-2000:], "ok": False}]
