"""Operators alone, differentiated, beside torch in float64: for the tests of gradient rules."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from fedprune.model.architecture import FIXED, Architecture, Axis, ChannelGroup, Segment, TensorKind, TensorSpec
from fedprune.runtime.session import OnnxSession
from fedprune_export import autodiff  # noqa: F401 (registers the rules)
from fedprune_export.autodiff.tape import Shape, Tape
from fedprune_export.ir.graph import Graph, Node, Port
from fedprune_export.pruning.model import Model

Oracle = Callable[..., torch.Tensor]
Arrays = dict[str, np.ndarray[Any, Any]]
Dims = tuple[int | str, ...]
Shapes = Mapping[str, Dims]


def normal(*shape: int, seed: int = 0, offset: float = 0.0) -> np.ndarray[Any, Any]:
    return np.asarray(np.random.default_rng([seed, *shape]).standard_normal(shape) + offset, np.float32)


class Symbols:
    """Dimensions as tests write them: a number, "N" for the batch, or runs of channels such as "g", "3*g*4+16".

    `passes*group*inner` is a group that lies several times on the axis, several indices per channel.
    """

    def __init__(self, data: Arrays, shapes: Shapes) -> None:
        self.sizes: dict[str, int] = {}
        for name, array in data.items():
            for dim, size in zip(shapes[name], array.shape, strict=True):
                runs = [] if isinstance(dim, int) or dim == "N" else _runs(dim)
                unknown = [r for r in runs if r[1] and r[1] not in self.sizes]
                if len(unknown) == 1:
                    rest = sum(p * self.sizes.get(g, 1) * i for p, g, i in runs if g not in [u[1] for u in unknown])
                    self.sizes[unknown[0][1]] = (size - rest) // (unknown[0][0] * unknown[0][2])

    @property
    def groups(self) -> tuple[ChannelGroup, ...]:
        return tuple(ChannelGroup(n, s) for n, s in self.sizes.items())

    def axis(self, dim: int | str) -> Axis | None:
        if isinstance(dim, int):
            return Axis.fixed(dim)
        if dim == "N":
            return None
        segments = []
        for passes, group, inner in _runs(dim):
            if not group:
                segments.append(Segment(FIXED, 0, inner))
                continue
            segments += [Segment(list(self.sizes).index(group), 0, self.sizes[group], inner)] * passes
        return Axis(tuple(segments))

    def kept_indices(self, dim: int | str, size: int, widths: dict[str, int]) -> list[int]:
        """The indices that are left of a dimension."""
        axis = self.axis(dim)
        if axis is None:
            return list(range(size))
        out: list[int] = []
        start = 0
        for s in axis.segments:
            count = s.length if s.group == FIXED else widths.get(list(self.sizes)[s.group], s.count) * s.inner
            out += range(start, start + count)
            start += s.length
        return out


def _runs(dim: str) -> list[tuple[int, str, int]]:
    out = []
    for run in dim.split("+"):
        factors = run.split("*")
        at = next((i for i, f in enumerate(factors) if not f.isdigit()), len(factors))
        before, after = ([int(f) for f in fs] for fs in (factors[:at], factors[at + 1 :]))
        group = factors[at] if at < len(factors) else ""
        out.append((int(np.prod(before)), group, int(np.prod(after))) if group else (1, "", int(np.prod(before))))
    return out


def gradient_session(
    nodes: Sequence[Node],
    data: Arrays,
    shapes: Shapes,
    constants: Arrays,
    values: Shapes | None = None,
    frozen: Sequence[str] = (),
) -> OnnxSession:
    """A session of y and the gradients of all data by the gradient `dy` of y.

    Args:
        nodes: The nodes of the model; the last one makes `y`.
        data: What is fed and differentiated by (integers are only fed), at full width.
        shapes: Its dimensions, as `Symbols` reads them.
        constants: Constants of the model.
        values: Dimensions of further values, as the channel analysis would find them.
        frozen: Names of data that is only fed.
    """
    symbols = Symbols(data, shapes)
    weights = {n: a for n, a in data.items() if "N" not in shapes[n]}
    graph = Graph(initializers={**constants, **weights}, nodes=list(nodes), opset=17)
    graph.inputs = [Port(n, a.dtype, (shapes[n][0], *a.shape[1:])) for n, a in data.items() if n not in weights]
    graph.outputs = [Port("y", np.dtype(np.float32), ())]
    axes = {n: tuple(map(symbols.axis, dims)) for n, dims in {**shapes, **(values or {})}.items()}
    specs = tuple(TensorSpec(n, TensorKind.WEIGHT, tuple(a for a in axes[n] if a)) for n in weights)
    arch = Architecture("op", symbols.groups, specs, (), (), (1,), (1,))
    out = Graph()
    tape = Tape(Model(graph, arch, values=axes), out, frozen)
    needs_gradient = {n: a.dtype.kind == "f" and n not in frozen for n, a in data.items()}
    entered: dict[str, Shape] = {}
    for name, array in data.items():
        entered[name] = tuple("N" if a is None else tape.axis_dim(a, arch) for a in axes[name])
        out.inputs.append(Port(name, array.dtype, entered[name]))
        tape.enter(name, name, entered[name], needs_gradient=needs_gradient[name])
    tape.forward()
    out.inputs.append(Port("dy", np.dtype(np.float32), tape.shape("y")))
    tape.add_gradient("y", "dy")
    tape.backward()
    out.emit("Identity", tape.value("y"), out="result")
    out.outputs.append(Port("result", np.dtype(np.float32), tape.shape("y")))
    for name in data:
        if needs_gradient[name]:
            gradient = tape.gradient(name)
            assert gradient is not None, name
            out.emit("Identity", gradient, out=f"{name}::gradient")
            out.outputs.append(Port(f"{name}::gradient", np.dtype(np.float32), entered[name]))
    return OnnxSession(out.to_bytes(), training=True)


def reference(oracle: Oracle, data: Arrays, dtype: torch.dtype, dy: np.ndarray[Any, Any] | None) -> Arrays:
    """The oracle's result and gradients; without dy only the result."""
    leaves = {
        k: torch.tensor(v, dtype=dtype, requires_grad=True) if v.dtype.kind == "f" else torch.tensor(v)
        for k, v in data.items()
    }
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
    shapes: Shapes | None = None,
    constants: Arrays | None = None,
    *,
    sums: bool = False,
    values: Shapes | None = None,
    narrow: dict[str, int] | None = None,
    frozen: Sequence[str] = (),
) -> None:
    """Result and gradients are as near to float64 as 1e-6, or twice torch's own float32 error.

    With `sums` (operators that are linear in each input) an error is also fine if it is five roundings of the sum of
    magnitudes: where a sum cancels to next to nothing, its relative error says nothing.

    With `narrow` (widths of groups) the same graph is also run with the first channels of each of these groups, and
    with a batch of one sample less; the oracle must do with data of any width.
    """
    shapes = shapes or {k: v.shape for k, v in data.items()}
    session = gradient_session(nodes, data, shapes, constants or {}, values, frozen)
    runs = [data]
    if narrow is not None:
        symbols = Symbols(data, shapes)
        runs.append(
            {
                n: a
                if not a.ndim
                else a[np.ix_(*(_fewer(symbols, d, size, narrow) for d, size in zip(shapes[n], a.shape, strict=True)))]
                for n, a in data.items()
            }
        )
    for fed in runs:
        dy = normal(*reference(oracle, fed, torch.float64, None)["result"].shape, seed=99)
        exact, usual = (reference(oracle, fed, t, dy) for t in (torch.float64, torch.float32))
        got = session.run({**fed, "dy": dy})
        sizes = {}
        if sums:
            positive = {k: abs(v) if v.dtype.kind == "f" else v for k, v in fed.items()}
            sizes = reference(oracle, positive, torch.float64, abs(dy))
        for name, value in exact.items():
            total_norm = float(np.linalg.norm(sizes[name])) if sums else 0.0
            cancelled = 3e-7 * total_norm / max(float(np.linalg.norm(value)), 1e-30)
            assert error(got[name], value) <= max(1e-6, cancelled, 2 * error(usual[name], value)), name


class Rows(dict[str, Callable[[], None]]):
    """Checks by name."""

    def add(self, name: str, nodes: Sequence[Node], oracle: Oracle, data: Arrays, *shapes: Any, **options: Any) -> None:
        """A row for `check`, whose oracle takes the data in their order."""
        self[name] = partial(check, nodes, lambda **leaves: oracle(*leaves.values()), data, *shapes, **options)

    def one(
        self,
        name: str,
        op: str,
        oracle: Oracle,
        x: np.ndarray[Any, Any],
        dims: Dims | None = None,
        constants: Arrays | None = None,
        *,
        sums: bool = False,
        values: Shapes | None = None,
        narrow: dict[str, int] | None = None,
        **attrs: Any,
    ) -> None:
        """A row of one operator of `x`, whose other inputs are constants."""
        nodes, shapes = [node(op, "x", *(constants or {}), **attrs)], dims and {"x": dims}
        self.add(name, nodes, oracle, {"x": x}, shapes, constants, sums=sums, values=values, narrow=narrow)


def _fewer(symbols: Symbols, dim: int | str, size: int, widths: dict[str, int]) -> list[int]:
    """What is left of a dimension when widths are narrow; of a batch all but one sample."""
    return list(range(max(1, size - 1))) if dim == "N" else symbols.kept_indices(dim, size, widths)


def node(op: str, *inputs: str, out: str = "y", **attrs: Any) -> Node:
    return Node(op, list(inputs), [out], attrs, f"the_{op}")


def ints(*values: int) -> np.ndarray[Any, Any]:
    return np.array(values, np.int64)


def floats(value: float) -> np.ndarray[Any, Any]:
    return np.array(value, np.float32)
