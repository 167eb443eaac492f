"""How long a model takes from ONNX file to channel groups: `OMP_NUM_THREADS=1 python benchmarks/analysis.py`.

That happens once per architecture. Models are timm's with random weights at their own input sizes.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import torch
from synthetic_nets import setting, write

from fedprune.model.architecture import widths_at
from fedprune.model.selection import Selection
from fedprune_export.channels import analyse
from fedprune_export.importing import export_torch, import_onnx
from fedprune_export.importing.inlining import prepared
from fedprune_export.importing.model_file import parse
from fedprune_export.importing.normalise import normalise
from fedprune_export.pruning.cut import cut
from support.nets.published_nets import timm_model

MODELS = ("resnet18", "resnet50", "mobilenetv2_100", "efficientnet_b0", "densenet121", "vit_tiny_patch16_224")
REPEATS = 5
SIZE = 224


def median_seconds(action: Callable[[], object]) -> float:
    """Median processor time of one thread."""
    times = []
    for _ in range(REPEATS):
        start = time.process_time()
        action()
        times.append(time.process_time() - start)
    return statistics.median(times)


def measure(name: str) -> dict[str, Any]:
    raw = export_torch(timm_model(name, SIZE), input_shape=(3, SIZE, SIZE))
    model = import_onnx(raw, name)
    normal = normalise(prepared(parse(raw, whole=False)), frozenset(model.tensors), raw)
    selection = Selection.of(model.architecture, widths_at(model.architecture, 0.5))
    row = {
        "model": name,
        "megabytes": len(raw) / 1e6,
        "nodes": len(model.graph.nodes),
        "groups": len(model.architecture.groups),
        "import_s": median_seconds(lambda: import_onnx(raw, name)),
        "normalise_s": median_seconds(
            lambda: normalise(prepared(parse(raw, whole=False)), frozenset(model.tensors), raw)
        ),
        "analysis_s": median_seconds(lambda: analyse(normal.graph, normal.parameters, normal.trace, name)),
        "cut_s": median_seconds(lambda: cut(model, selection)),
    }
    print(f"{name}: import {row['import_s']:.2f} s, analysis {row['analysis_s']:.3f} s", flush=True)
    return row


def main() -> None:
    torch.set_num_threads(1)
    rows = [measure(name) for name in MODELS]
    about = setting()
    lines = [
        "# Import and channel analysis",
        "",
        (
            f"{about['date']}, {about['cpu']}, {about['cores']} cores (one used; load {about['load']} from others), "
            f"Python {about['python']}, numpy {about['numpy']}. `OMP_NUM_THREADS=1 python benchmarks/analysis.py`"
        ),
        "",
        (
            f"Processor time, medians of {REPEATS}, pictures of {SIZE}×{SIZE}. *import*: from an ONNX file's bytes to "
            "the model, which includes everything else but the cut; *normalise*: reading, shapes, simplification, and "
            "running both graphs beside each other; *analysis*: channel groups; *cut*: one submodel of half the widths."
        ),
        "",
        "| model | file MB | nodes | groups | import s | normalise s | analysis s | cut s |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {r['model']} | {r['megabytes']:.0f} | {r['nodes']} | {r['groups']} | {r['import_s']:.2f} "
        f"| {r['normalise_s']:.2f} | {r['analysis_s']:.3f} | {r['cut_s']:.3f} |"
        for r in rows
    ]
    write("analysis", {"setting": about, "rows": rows}, "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
