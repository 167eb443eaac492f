"""Operators alone, differentiated, beside torch in float64: for the tests of gradient rules."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from fedprune.architecture import Architecture
from fedprune.session import Session
from fedprune_export import gradients  # noqa: F401 (registers the rules)
from fedprune_export.gradients.tape import Tape
from fedprune_export.graph import Graph, Node, Port
from fedprune_export.imported import Model

Oracle = Callable[..., torch.Tensor]
Arrays = dict[str, np.ndarray[Any, Any]]


def normal(*shape: int, seed: int = 0, offset: float = 0.0) -> np.ndarray[Any, Any]:
    return (np.random.default_rng([seed, *shape]).standard_normal(shape) + offset).astype(np.float32)


def differentiated(
    nodes: Sequence[Node], data: Arrays, shapes: dict[str, tuple[int | str, ...]], constants: Arrays
) -> Session:
    """A session of y and the gradients of all data by the gradient `dy` of y."""
    graph = Graph(initializers=dict(constants), nodes=list(nodes), opset=17)
    graph.inputs = [Port(n, a.dtype, (shapes[n][0], *a.shape[1:])) for n, a in data.items() if a.ndim]
    graph.outputs = [Port("y", np.dtype(np.float32), ())]
    arch = Architecture("op", (), (), (), (), (1,), 1)
    out = Graph()
    tape = Tape(Model(graph, arch), out)
    for name, array in data.items():
        for dim, size in zip(shapes[name], array.shape, strict=True):
            if isinstance(dim, str) and dim != "N":
                tape.symbol(dim, size)
        out.inputs.append(Port(name, array.dtype, shapes[name]))
        tape.enter(name, name, shapes[name], wanted=True)
    tape.forward()
    out.inputs.append(Port("dy", np.dtype(np.float32), tape.shape("y")))
    tape.add("y", "dy")
    tape.backward()
    out.emit("Identity", tape.value("y"), out="result")
    out.outputs.append(Port("result", np.dtype(np.float32), tape.shape("y")))
    for name in data:
        gradient = tape.gradient(name)
        assert gradient is not None, name
        out.emit("Identity", gradient, out=f"{name}::gradient")
        out.outputs.append(Port(f"{name}::gradient", np.dtype(np.float32), shapes[name]))
    return Session(out.to_bytes(), training=True)


def reference(oracle: Oracle, data: Arrays, dtype: torch.dtype, dy: np.ndarray[Any, Any] | None) -> Arrays:
    """The oracle's result and gradients; without dy only the result."""
    leaves = {k: torch.tensor(v, dtype=dtype, requires_grad=True) for k, v in data.items()}
    y = oracle(**leaves)
    out = {"result": y.detach().numpy()}
    if dy is not None:
        y.backward(torch.tensor(dy, dtype=dtype))
        out |= {f"{k}::gradient": v.grad.numpy() for k, v in leaves.items() if v.grad is not None}
    return out


def error(got: np.ndarray[Any, Any], want: np.ndarray[Any, Any]) -> float:
    assert got.shape == want.shape
    return float(np.linalg.norm((got - want).ravel()) / max(float(np.linalg.norm(want.ravel())), 1e-30))


def check(
    nodes: Sequence[Node],
    oracle: Oracle,
    data: Arrays,
    shapes: dict[str, tuple[int | str, ...]] | None = None,
    constants: Arrays | None = None,
    *,
    sums: bool = False,
) -> None:
    """Result and gradients are as near to float64 as 1e-6, or twice torch's own float32 error.

    With `sums` (operators that are linear in each input) an error is also fine if it is five roundings of the sum of
    magnitudes: where a sum cancels to next to nothing, its relative error says nothing.
    """
    shapes = shapes or {k: v.shape for k, v in data.items()}
    want = reference(oracle, data, torch.float64, None)["result"]
    dy = normal(*want.shape, seed=99)
    exact, usual = (reference(oracle, data, t, dy) for t in (torch.float64, torch.float32))
    got = differentiated(nodes, data, shapes, constants or {}).run({**data, "dy": dy})
    sizes = reference(oracle, {k: abs(v) for k, v in data.items()}, torch.float64, abs(dy)) if sums else {}
    for name, value in exact.items():
        cancelled = 3e-7 * float(np.linalg.norm(sizes[name])) / float(np.linalg.norm(value)) if sums else 0.0
        assert error(got[name], value) <= max(1e-6, cancelled, 2 * error(usual[name], value)), name


def node(op: str, *inputs: str, out: str = "y", **attrs: Any) -> Node:
    return Node(op, list(inputs), [out], attrs, f"the_{op}")


def ints(*values: int) -> np.ndarray[Any, Any]:
    return np.array(values, np.int64)


def floats(value: float) -> np.ndarray[Any, Any]:
    return np.array(value, np.float32)
