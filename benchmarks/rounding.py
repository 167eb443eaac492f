"""Channel counts that kernels dislike: MobileNetV2 narrowed without rounding, rounded to 8 and 16, and as planned.

    OMP_NUM_THREADS=1 python benchmarks/rounding.py

Users of Torch-Pruning found that pruning without rounding tripled the time that onnxruntime takes for MobileNetV2 on
a processor, and that rounding channels to multiples of 16 removed it (its issue 38). This repeats the measurement and
adds what the planner chooses from the probe's table. Processor time of one prediction on one thread, in turns.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fedprune.model.architecture import Architecture, widths_at
from fedprune.planning.kernel_workload import workload
from fedprune.planning.latency_model import LatencyTable, fitted
from fedprune.planning.plan import DENSITIES
from fedprune.planning.width_candidates import rungs
from fedprune_device.hardware.layer_timing import measure
from fedprune_export.importing import export_torch, import_onnx

ROOT = Path(__file__).resolve().parents[1]
SIZE, BATCH = 224, 16
SHARES = (0.9, 0.7, 0.5, 0.3)
RUNS = 12


def rounded(architecture: Architecture, widths: Sequence[int], multiple: int) -> tuple[int, ...]:
    """Widths rounded to the nearest multiple, as a user would."""
    pairs = zip(widths, architecture.sizes, strict=True)
    return tuple(min(n, max(multiple, round(w / multiple) * multiple)) for w, n in pairs)


def ways(architecture: Architecture, table: LatencyTable, share: float) -> dict[str, tuple[int, ...]]:
    """The ways to keep a share of the channels."""
    random = np.random.default_rng(round(100 * share))
    # Pruning by importance over the whole net keeps other shares of each group, near the mean.
    spread = np.clip(share * random.uniform(0.85, 1.15, len(architecture.sizes)), 0.01, 1)
    uneven = tuple(max(1, round(float(n * s))) for n, s in zip(architecture.sizes, spread, strict=True))
    ladder = rungs(architecture, table, BATCH, DENSITIES)
    macs = float(workload(architecture).forward_macs(uneven)[0])
    planned = min(ladder, key=lambda r: abs(float(workload(architecture).forward_macs(r.widths)[0]) - macs))
    return {
        "uniform, not rounded": widths_at(architecture, share),
        "uneven, not rounded": uneven,
        "uneven, rounded to 8": rounded(architecture, uneven, 8),
        "uneven, rounded to 16": rounded(architecture, uneven, 16),
        "planned": planned.widths,
    }


def measured(runs: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Milliseconds of every way, in turns."""
    from latency import pair_seconds

    return dict(zip(runs, (1e3 * s for s in pair_seconds(list(runs.values()), RUNS)), strict=True))


def page(about: dict[str, Any], result: dict[str, Any]) -> str:
    """The results as a page."""
    whole = result["whole_ms"]
    lines = []
    for row in result["rows"]:
        cells = [
            f"{row['share']:.1f}",
            row["way"],
            f"{row['macs']:.0%}",
            f"{row['ms']:.2f}",
            f"{row['ms'] / whole:.2f}",
        ]
        cells += [f"{row['ms'] / whole / row['macs']:.2f}", f"{row['predicted_ms']:.2f}"]
        lines.append("| " + " | ".join(cells) + " |")
    table = "\n".join(lines)
    return f"""# Rounding channels: MobileNetV2 on onnxruntime

{about["date"]}, {about["cpu"]}, {about["cores"]} cores (one used; load {about["load"]} at the start),
Python {about["python"]}, onnxruntime {about["onnxruntime"]}. `python benchmarks/rounding.py`

One prediction of {SIZE}×{SIZE} pixels, processor time on one thread, medians of {RUNS} runs in turns. The whole model
takes {whole:.2f} ms. "Per multiplication" is the time of a multiplication over that of the whole model's: 1 means that
narrowing saves as much time as work. Uneven: every group keeps its own share, within 15 % of the mean, as pruning by
importance over the whole net does. Planned: the rung of the planner's ladder with as many MACs as the uneven
one.

| share | way | MACs | ms | of the whole's time | per MAC | predicted ms |
|---|---|---|---|---|---|---|
{table}
"""


def main() -> None:
    """Measure and write the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dry", action="store_true", help="write nothing but to the terminal")
    arguments = parser.parse_args()
    sys.path.insert(0, str(ROOT / "tests"))
    from latency import prediction
    from synthetic_nets import setting, write

    from support.nets import published_nets as zoo

    about = setting("onnxruntime")
    model = import_onnx(export_torch(zoo.timm_model("mobilenetv2_100", SIZE)), "mobilenetv2")
    architecture = model.architecture
    table = fitted(measure(threads=1, seconds=20.0, clock=time.process_time))
    random = np.random.default_rng(0)

    def run(widths: Sequence[int]) -> Callable[[], object]:
        shapes = architecture.shapes(widths)
        tensors = {n: (0.01 + 0.05 * random.random(s)).astype(np.float32) for n, s in shapes.items()}
        return prediction(model, widths, tensors)

    full = float(workload(architecture).forward_macs(architecture.sizes)[0])
    rows, wholes = [], []
    for share in SHARES:
        plans = ways(architecture, table, share)
        times = measured({"whole": run(architecture.sizes), **{way: run(widths) for way, widths in plans.items()}})
        wholes.append(times["whole"])
        for way, widths in plans.items():
            macs = float(workload(architecture).forward_macs(widths)[0]) / full
            predicted = 1e3 * float(table.latency_seconds(architecture, widths)[0])
            row = {"share": share, "way": way, "macs": macs, "ms": times[way], "predicted_ms": predicted}
            rows.append({**row, "widths": list(widths)})
    result = {"setting": about, "whole_ms": float(np.median(wholes)), "rows": rows}
    if arguments.dry:
        print(page(about, result))
        Path(tempfile.gettempdir(), "rounding.json").write_text(json.dumps(result))
    else:
        write("rounding", result, page(about, result))


if __name__ == "__main__":
    main()
