"""Layers alone against torch eager: `OMP_NUM_THREADS=1 python -m benchmarks.layers`.

Forward and backward, with the gradients of all inputs, in the form that serves every width of an architecture. Steps of
both run in turn in one process and one thread; CPU time, so that neighbours on the machine count for less.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.harness import in_turns, ratio, run_cases

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
    seconds = in_turns({"ours": ours, "torch": theirs}, PAIRS, WARM_UP)
    ms, torch_ms = (1e3 * statistics.median(seconds[name]) for name in ("ours", "torch"))
    return {"cpu_ms": ms, "torch_cpu_ms": torch_ms, "ratio": ratio(seconds["ours"], seconds["torch"])}


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
    import torch

    from support.oracles.differentiation import node

    gates = 4 if op == "LSTM" else 3
    data = {
        "x": normal(steps, batch, inputs),
        "w": normal(1, gates * hidden, inputs) / np.float32(hidden**0.5),
        "r": normal(1, gates * hidden, hidden) / np.float32(hidden**0.5),
        "b": normal(1, 2 * gates * hidden) / np.float32(hidden**0.5),
    }
    shapes: Shapes = {
        "x": (steps, "N", "i"), "w": (1, f"{gates}*h", "i"), "r": (1, f"{gates}*h", "h"), "b": (1, f"{2 * gates}*h"),
    }  # fmt: skip
    order = (0, 2, 3, 1) if op == "LSTM" else (1, 0, 2)  # of the gates: ONNX has iofc and zrh, torch ifgo and rzn

    def sorted_gates(value: Any) -> Any:
        parts = value.reshape(gates, hidden, -1)
        return torch.cat([parts[i] for i in order]).squeeze(-1)

    def oracle(x: Any, w: Any, r: Any, b: Any) -> Any:
        both = b[0].reshape(2, gates * hidden)
        flat = [sorted_gates(w[0]), sorted_gates(r[0]), sorted_gates(both[0]), sorted_gates(both[1])]
        state = torch.zeros(1, batch, hidden)
        states = (state, state) if op == "LSTM" else state
        run = torch._VF.lstm if op == "LSTM" else torch._VF.gru  # type: ignore[attr-defined]
        return run(x, states, flat, True, 1, 0.0, True, False, False)[0].unsqueeze(1)

    attrs = {"linear_before_reset": 1} if op == "GRU" else {}
    return compared(node(op, "x", "w", "r", "b", hidden_size=hidden, **attrs), data, shapes, oracle)


def cases() -> list[dict[str, Any]]:
    made = []
    for batch, channels, size, k, stride in DEPTHWISE:
        layer = f"{k}×{k}, stride {stride}, {channels} channels of {size}×{size}, batch {batch}"
        made.append({"kind": "depthwise", "layer": layer, "shape": (batch, channels, 1, size, k, stride, "groups")})
    for batch, groups, inside, size, k, stride in GROUPED:
        layer = f"{k}×{k}, stride {stride}, {groups} groups of {inside} channels of {size}×{size}, batch {batch}"
        for cut in ("groups", "positions"):
            shape = (batch, groups, inside, size, k, stride, cut)
            made.append({"kind": f"in groups, {cut} cut", "layer": layer, "shape": shape})
    for op, batch, steps, inputs, hidden in RECURRENT:
        layer = f"{op}, {steps} steps, {inputs} inputs, {hidden} units, batch {batch}"
        made.append({"kind": "recurrent", "layer": layer, "shape": (op, batch, steps, inputs, hidden)})
    return made


def measure(kind: str, layer: str) -> dict[str, float]:
    shape = next(case["shape"] for case in cases() if (case["kind"], case["layer"]) == (kind, layer))
    return recurrent(*shape) if kind == "recurrent" else convolution(*shape)


def main() -> None:
    import torch

    torch.set_num_threads(1)
    wanted = [{k: case[k] for k in ("kind", "layer")} for case in cases()]
    run_cases("layers", __doc__, wanted, measure, "onnxruntime", "torch", pairs=PAIRS)


if __name__ == "__main__":
    main()
