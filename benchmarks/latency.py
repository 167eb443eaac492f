"""Predicted beside measured: step time and latency of random width plans, and of planned widths beside uniform ones.

    OMP_NUM_THREADS=1 python -m benchmarks.latency

All times are processor time on one thread (`time.process_time`), medians over several runs, so that neighbours on the
machine disturb them little; plans are visited in turn. The table of layers' times is the probe's own, measured with the
same clock before each net; no net of this page is among the probe's. The networks need the tests' folder, and timm.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import in_turns, parser, save, setting
from benchmarks.measured_steps import step_feeds
from benchmarks.planner import module_of
from fedprune.core import tensorfile
from fedprune.model.architecture import Architecture, widths_at
from fedprune.model.features import Features
from fedprune.planning.kernel_workload import workload
from fedprune.planning.latency_model import LatencyTable, Measurement, fit_latency_table
from fedprune.planning.plan_search import DENSITIES
from fedprune.planning.width_candidates import width_candidates
from fedprune.runtime.session import OnnxSession
from fedprune_device.hardware.layer_timing import measure_layers
from fedprune_device.serving.predictor import GRAPH, WEIGHTS, Predictor
from fedprune_export.bundles.inference import inference_model
from fedprune_export.importing import export_torch, import_onnx
from fedprune_export.pruning.model import Model
from fedprune_export.training.step_graph import training_graph

BATCH = 16
LEARNT_AT = 0.5
"""The uniform share at which one measured round teaches the correction."""

SHARES = (0.85, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2)
"""Where planned widths are compared with uniform ones."""

STEPS, PREDICTIONS = 5, 15
NETS = {"LeNet": ("LeNet", 0), "ResNet20": ("ResNet20-BN", 0), "MobileNetV2": ("mobilenetv2_100", 64)}
"""What `benchmarks.planner` calls them, and the size of images."""


class Bench:
    """A model whose steps and predictions can be timed at any widths."""

    def __init__(self, model: Model) -> None:
        self.model, self.architecture = model, model.architecture
        self._step = OnnxSession(training_graph(model, Features()).to_bytes(), threads=1, training=True)
        self._random = np.random.default_rng(0)

    def tensors(self, widths: Sequence[int]) -> dict[str, Any]:
        """Weights of an ordinary size."""
        shapes = self.architecture.shapes(widths)
        return {n: (0.01 + 0.05 * self._random.random(s)).astype(np.float32) for n, s in shapes.items()}

    def step(self, widths: Sequence[int]) -> Callable[[], object]:
        """A training step to be timed."""
        tensors = self.tensors(widths)
        x = self._random.standard_normal((BATCH, *self.architecture.input_shape)).astype(np.float32)
        feeds = step_feeds(self._step.inputs, tensors, x, self._random.integers(0, self.architecture.classes, BATCH))
        return lambda: self._step.run(feeds)

    def prediction(self, widths: Sequence[int]) -> Callable[[], object]:
        """A prediction of one sample to be timed."""
        with tempfile.TemporaryDirectory() as made:
            folder = Path(made)
            (folder / GRAPH).write_bytes(inference_model(self.model, widths))
            (folder / WEIGHTS).write_bytes(tensorfile.encode(self.tensors(widths)))
            predictor = Predictor(folder, threads=1)
        x = np.random.default_rng(1).standard_normal((1, *self.architecture.input_shape)).astype(np.float32)
        return lambda: predictor.predict(x)


def medians(runs: Sequence[Callable[[], object]], times: int) -> list[float]:
    """Median processor time of several runs that take turns."""
    taken = in_turns({str(place): run for place, run in enumerate(runs)}, times)
    return [statistics.median(seconds) for seconds in taken.values()]


def random_plans(architecture: Architecture, count: int, seed: int) -> list[tuple[int, ...]]:
    """Widths that are random in every group, from a tenth of it to the whole."""
    random = np.random.default_rng(seed)
    return [
        tuple(max(1, round(float(n * share))) for n, share in zip(architecture.sizes, shares, strict=True))
        for shares in random.uniform(0.1, 1, (count, len(architecture.sizes)))
    ]


def predictions(table: LatencyTable, architecture: Architecture, plans: Sequence[Sequence[int]]) -> list[list[float]]:
    """Predicted step times and latencies."""
    step_s, latency_s = table.step_seconds(architecture, plans, BATCH), table.latency_seconds(architecture, plans)
    return [step_s.tolist(), latency_s.tolist()]


def errors(predicted: Sequence[float], seen: Sequence[float]) -> dict[str, float]:
    """Quartiles of the absolute relative error, its worst, and the mean of the signed one."""
    off = [p / s - 1 for p, s in zip(predicted, seen, strict=True)]
    quarter, half, three = np.quantile(np.abs(off), (0.25, 0.5, 0.75)).tolist()
    worst = float(np.abs(off).max())
    return {"quarter": quarter, "median": half, "three_quarters": three, "worst": worst, "bias": float(np.mean(off))}


def equal_work(architecture: Architecture, widths: tuple[int, ...]) -> tuple[int, ...]:
    """The narrowest uniform widths with at least as many MACs."""
    uniform = [widths_at(architecture, k / 256) for k in range(1, 257)]
    macs = workload(architecture).forward_macs([widths, *uniform])
    return uniform[int(np.argmax(macs[1:] >= macs[0]))]


def compare_plans(bench: Bench, table: LatencyTable) -> list[dict[str, Any]]:
    """Rungs of the planner's ladder next to uniform widths with at least as many MACs."""
    architecture, rows = bench.architecture, []
    ladder = width_candidates(architecture, table, BATCH, DENSITIES)
    for share in SHARES:
        candidate = min(ladder, key=lambda r: abs(r.density - share))
        uniform = equal_work(architecture, candidate.widths)
        both = (candidate.widths, uniform)
        step_s = medians([bench.step(w) for w in both], STEPS + 2)
        latency_s = medians([bench.prediction(w) for w in both], 2 * PREDICTIONS)
        macs = workload(architecture).forward_macs(both)
        predicted = predictions(table, architecture, both)
        rows.append(
            {
                "density": candidate.density,
                "multiple": candidate.multiple,
                "macs": float(macs[0] / macs[1]),
                "same": candidate.widths == uniform,
                "step_s": step_s,
                "latency_s": latency_s,
                "predicted_step_s": predicted[0],
                "predicted_latency_s": predicted[1],
            }
        )
    return rows


def measure_net(name: str, module: Any, count: int, probed: list[Measurement]) -> dict[str, Any]:
    """All measurements of one net; the probe's are added to what was probed."""
    model = import_onnx(export_torch(module), name)
    bench = Bench(model)
    probed += measure_layers(threads=1, seconds=20.0, clock=time.process_time)
    print(f"{name}: measuring {count} plans", file=sys.stderr)
    plans = [widths_at(model.architecture, LEARNT_AT), *random_plans(model.architecture, count, 1)]
    seen = [(medians([bench.step(w)], STEPS)[0], medians([bench.prediction(w)], PREDICTIONS)[0]) for w in plans]
    return {"name": name, "bench": bench, "plans": plans, "seen": seen}


def result_of(net: dict[str, Any], table: LatencyTable) -> dict[str, Any]:
    """Errors of the table on one net, as it is and corrected by one measured round, and planned beside uniform."""
    architecture = net["bench"].architecture
    predicted = predictions(table, architecture, net["plans"])
    out: dict[str, Any] = {"net": net["name"], "groups": len(architecture.groups), "plans": len(net["plans"]) - 1}
    for place, what in enumerate(("step", "latency")):
        seen = [s[place] for s in net["seen"]]
        learnt = seen[0] / predicted[place][0]
        out[what] = {
            "seconds": [min(seen[1:]), statistics.median(seen[1:]), max(seen[1:])],
            "table": errors(predicted[place][1:], seen[1:]),
            "corrected": errors([learnt * p for p in predicted[place][1:]], seen[1:]),
            "predicted": predicted[place],
            "measured": seen,
        }
    out["planned"] = compare_plans(net["bench"], table)
    return out


def main() -> None:
    command = parser(__doc__)
    command.add_argument("--plans", type=int, default=50, help="random width plans of each net (default: 50)")
    options = command.parse_args()
    wanted, probed = dict(options.only).get("net"), list[Measurement]()
    chosen = [name for name in NETS if wanted in (None, name)]
    measured = [measure_net(name, module_of(*NETS[name]), options.plans, probed) for name in chosen]
    table = fit_latency_table(probed)
    rows = [result_of(net, table) for net in measured]
    worst = {w: max(r[f"{w}_s"][0] / r[f"{w}_s"][1] for n in rows for r in n["planned"]) for w in ("step", "latency")}
    shown = {"block": table.block, "points": table.points, "error": table.error}
    body = {"setting": setting("onnxruntime"), "count": options.plans, "table": shown, "worst_planned": worst}
    errors = [
        {"net": net["net"], "what": what, **{k: net[what][k] for k in ("seconds", "table", "corrected")}}
        for net in rows
        for what in ("step", "latency")
    ]
    planned = [{"net": net["net"], **row} for net in rows for row in net["planned"]]
    save(options.out or "latency", {**body, "nets": rows, "errors": errors, "planned": planned})


if __name__ == "__main__":
    main()
