"""Predictions of one sample in float32, float16 and int8, from the files that a board makes."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.gpu.machine import Machine, timings
from benchmarks.gpu.placement import placement
from benchmarks.precision import make
from benchmarks.step_nets import NETS, network
from fedprune.model import step_contract
from fedprune.model.architecture import widths_at
from fedprune.planning.probe_report import CPU, CUDA
from fedprune.runtime.precision_files import FLOAT32, served_files
from fedprune_device.serving.predictor import Predictor
from fedprune_export.importing import export_torch, import_onnx

DENSITIES = (1.0, 0.25)
TURNS = 20
RESERVE_S = 110.0  # no net is begun when less time is left

# How far the card's outputs may be from the processor's of the same file, as a share of what the precision moves these.
# Float16 rounds elsewhere on the card. Int8 does not, but for activations between two of its numbers: on processors,
# samples nudged by a unit in the last place moved outputs by up to a fifth of what int8 does.
SLACK = {FLOAT32: 0.0, "float16": 2.0, "int8": 0.5}
# The least tolerance, as a share of the largest output: float32 without TF32 is a hundred times as exact.
FLOOR = 1e-4


def measure_predictions(machine: Machine) -> Iterator[dict[str, Any]]:
    """A row for each net, width and precision."""
    nets, densities = (("lenet",), (0.25,)) if machine.dry else (NETS, DENSITIES)
    for name in machine.in_time(nets, 0.0 if machine.dry else RESERVE_S):
        model = import_onnx(export_torch(network(name)), name)
        for density in densities:
            x = np.random.default_rng(1).standard_normal((16, *model.architecture.input_shape)).astype(np.float32)
            with tempfile.TemporaryDirectory() as place:
                folder = Path(place)
                make(folder, model, widths_at(model.architecture, density), x)
                for row in _rows(machine, folder, x):
                    yield {"net": name, "density": density, **row}


def _rows(machine: Machine, folder: Path, x: Any) -> Iterator[dict[str, Any]]:
    device = machine.device
    expected = Predictor(folder / served_files(FLOAT32)[0]).predict(x)
    for precision in SLACK:
        file = folder / served_files(precision)[0]
        predictors = {unit: Predictor(file, cuda=unit == CUDA) for unit in dict.fromkeys((CPU, device))}
        outputs = {unit: p.predict(x) for unit, p in predictors.items()}
        verdict = judge_outputs(precision, outputs[device], outputs[CPU], expected)
        times = timings(
            {unit: lambda p=p: p.predict(x[:1]) for unit, p in predictors.items()},  # type: ignore[misc]
            2 if machine.dry else TURNS,
            CPU,
        )
        nodes = placement(file, {step_contract.X: x[:1]}, device)
        provider = getattr(predictors[device].session, "provider", "")
        # CUDA has no int8 kernels for some operators: there the table says what the processor does.
        on_card = device == CPU or (provider == CUDA and (precision == "int8" or not nodes["work"]))
        yield {
            "precision": precision,
            "provider": provider,
            **verdict,
            **times,
            "placement": nodes,
            "ok": on_card and verdict["ok"],
        }


def judge_outputs(precision: str, outputs: Any, same_file: Any, float32: Any) -> dict[str, Any]:
    """`apart`, the largest distance of outputs from the processor's of the same file; `away`, of these from those in
    float32; and whether the first is within its tolerance (`ok`)."""
    apart, away = (float(np.abs(a - b).max()) for a, b in ((outputs, same_file), (same_file, float32)))
    return {
        "apart": apart,
        "away": away,
        "ok": apart <= max(SLACK[precision] * away, FLOOR * float(np.abs(float32).max())),
    }
