"""Layers alone against torch eager: `OMP_NUM_THREADS=1 python benchmarks/layers.py`.

Forward and backward, with the gradients of all inputs, in the form that serves every width of an architecture. Steps of
both run in turn in one process and one thread; CPU time, so that neighbours on the machine count for less.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

PAIRS, WARM_UP = 11, 2

Arrays = dict[str, np.ndarray[Any, Any]]
Shapes = dict[str, tuple[int | str, ...]]

DEPTHWISE = (
    # batch, channels, map, kernel, stride: MobileNetV2's layers for images of 224 and of 32 pixels
    (16, 32, 112, 3, 1),
    (16, 96, 112, 3, 2),
    (16, 144, 56, 3, 1),
    (16, 192, 28, 3, 1),
    (16, 384, 14, 3, 1),
    (16, 576, 14, 3, 2),
    (16, 960, 7, 3, 1),
    (32, 96, 16, 3, 1),
    (32, 192, 8, 3, 1),
    (32, 384, 4, 3, 1),
    (32, 960, 2, 3, 1),
    (32, 96, 16, 5, 1),
)
GROUPED = (
    # batch, groups, channels of a group, map, kernel, stride: of RegNets, ResNeXts and ShuffleNets
    (16, 8, 8, 28, 3, 1),
    (16, 8, 24, 14, 3, 1),
    (16, 32, 4, 28, 3, 1),
    (16, 32, 8, 14, 3, 1),
    (16, 32, 16, 7, 3, 1),
    (16, 32, 16, 14, 3, 2),
    (16, 3, 80, 14, 1, 1),
)
RECURRENT = (
    # operator, batch, steps, inputs, hidden units
    ("LSTM", 32, 128, 9, 64),
    ("LSTM", 32, 128, 64, 128),
    ("GRU", 32, 128, 9, 64),
    ("GRU", 32, 128, 64, 128),
)


def normal(*shape: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(shape).standard_normal(shape).astype(np.float32)


def compared(node: Any, data: Arrays, shapes: Shapes, oracle: Callable[..., Any]) -> dict[str, float]:
    """CPU time of both, in ms; first their results are compared."""
    import torch

    from support.oracles.differentiation import differentiated

    leaves = {n: torch.tensor(a, requires_grad=True) for n, a in data.items()}
    result = oracle(**leaves)
    dy = normal(*result.shape)
    session, slope = differentiated([node], data, shapes, {}), torch.tensor(dy)

    def ours() -> Arrays:
        return session.run({**data, "dy": dy})

    def theirs() -> Any:
        for leaf in leaves.values():
            leaf.grad = None
        y = oracle(**leaves)
        y.backward(slope)
        return y

    got, want = ours(), theirs()
    pairs = [(got["result"], want.detach()), *((got[f"{n}::gradient"], leaf.grad) for n, leaf in leaves.items())]
    worst = max(float(np.abs(a - b.numpy()).max() / np.abs(b.numpy()).max()) for a, b in pairs)
    if worst > 1e-4:
        raise SystemExit(f"{node.name}: the results differ by {worst:.1e}")
    rows = []
    for _ in range(WARM_UP + PAIRS):
        row = []
        for run in (ours, theirs):
            start = time.process_time()
            run()
            row.append(1e3 * (time.process_time() - start))
        rows.append(row)
    kept = rows[WARM_UP:]
    ms, torch_ms = (statistics.median(r[i] for r in kept) for i in (0, 1))
    return {"cpu_ms": ms, "torch_cpu_ms": torch_ms, "ratio": statistics.median(a / b for a, b in kept)}


def convolution(batch: int, groups: int, inside: int, size: int, k: int, stride: int, cut: str) -> dict[str, float]:
    """A convolution in groups of which whole ones are cut, or the same positions of each."""
    import torch

    from support.oracles.differentiation import node

    channels = groups * inside
    data = {"x": normal(batch, channels, size, size), "w": normal(channels, inside, k, k)}
    whole, each = (f"g*{inside}", inside) if inside > 1 else ("g", 1), (f"{groups}*i", f"{groups}*o", "i")
    shapes: Shapes = {"x": ("N", whole[0], size, size), "w": (whole[0], whole[1], k, k)}
    if cut == "positions":
        shapes = {"x": ("N", each[0], size, size), "w": (each[1], each[2], k, k)}
    attrs = {"group": groups, "kernel_shape": [k, k], "strides": [stride] * 2, "pads": [k // 2] * 4}

    def oracle(x: Any, w: Any) -> Any:
        return torch.nn.functional.conv2d(x, w, None, stride, k // 2, 1, groups)

    return compared(node("Conv", "x", "w", **attrs), data, shapes, oracle)


def recurrent(op: str, batch: int, steps: int, inputs: int, hidden: int) -> dict[str, float]:
    """A recurrent layer in one direction."""
    from test_gradients_recurrent import dims, tensors, torchs

    from support.oracles.differentiation import node

    case = {"direction": "forward", "steps": steps, "inputs": inputs, "hidden": hidden, "bias": True, "states": False}
    data = tensors(op, case)
    data = {**data, "x": normal(steps, batch, inputs)}
    layer, attrs = torchs(op, case), {"linear_before_reset": 1} if op == "GRU" else {}
    one = node(op, "x", "w", "r", "b", hidden_size=hidden, **attrs)
    return compared(one, data, {n: dims(op, case)[n] for n in data}, lambda **leaves: layer(**leaves)[0])


def main() -> None:
    import torch
    from synthetic_nets import setting, write

    torch.set_num_threads(1)
    about = setting("onnxruntime", "torch")
    rows: list[dict[str, Any]] = []

    def add(kind: str, layer: str, times: dict[str, float]) -> None:
        rows.append({"kind": kind, "layer": layer, **times})
        print(rows[-1], flush=True)

    for batch, channels, size, k, stride in DEPTHWISE:
        layer = f"{k}×{k}, stride {stride}, {channels} channels of {size}×{size}, batch {batch}"
        add("depthwise", layer, convolution(batch, channels, 1, size, k, stride, "groups"))
    for batch, groups, inside, size, k, stride in GROUPED:
        layer = f"{k}×{k}, stride {stride}, {groups} groups of {inside} channels of {size}×{size}, batch {batch}"
        for cut in ("groups", "positions"):
            add(f"in groups, {cut} cut", layer, convolution(batch, groups, inside, size, k, stride, cut))
    for op, batch, steps, inputs, hidden in RECURRENT:
        layer = f"{op}, {steps} steps, {inputs} inputs, {hidden} units, batch {batch}"
        add("recurrent", layer, recurrent(op, batch, steps, inputs, hidden))
    write("layers", {"setting": about, "pairs": PAIRS, "rows": rows}, page(about, rows))


def page(about: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    table = "\n".join(
        f"| {r['kind']} | {r['layer']} | {r['cpu_ms']:.1f} | {r['torch_cpu_ms']:.1f} | {r['ratio']:.2f} |" for r in rows
    )
    return f"""# Layers alone

{about["date"]}, {about["cpu"]}, {about["cores"]} cores (load {about["load"]} from neighbours),
Python {about["python"]}, onnxruntime {about["onnxruntime"]}, torch {about["torch"]}. `python benchmarks/layers.py`

Forward and backward of one layer with all gradients, one thread, CPU time; medians of {PAIRS} pairs of runs in turn;
*ratio* is the median ratio within a pair, below 1 where ours is faster. Our graph serves every width: the number of
channels of a depthwise layer varies, and of a layer in groups either the number of groups or their length.

| kind | layer | ms | torch ms | ratio |
|---|---|---|---|---|
{table}
"""


if __name__ == "__main__":
    main()
