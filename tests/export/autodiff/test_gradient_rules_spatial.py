"""Gradients of batch normalisation and convolution against torch in float64."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from fedprune.core.errors import ModelError
from fedprune.model.architecture import Architecture, Axis, ChannelGroup, Segment, TensorKind, TensorSpec
from fedprune.runtime.session import OnnxSession
from fedprune_export.autodiff.tape import Tape
from fedprune_export.ir.graph import Graph, Port
from fedprune_export.pruning.model import Model
from support.oracles.differentiation import Arrays, Symbols, check, error, gradient_session, node, normal, reference

pytestmark = pytest.mark.torch

F = torch.nn.functional


# -- batch normalisation: gradients here, statistics in test_training -----------------------------------------------


@pytest.mark.parametrize("shape", [(8, 5), (4, 3, 6, 6), (4, 7, 1, 1), (32, 16, 8, 8)])
@pytest.mark.parametrize("offset", [0.0, 30.0])
def test_batch_norm(shape: tuple[int, ...], offset: float) -> None:
    for name, (ours, torchs) in _batch_norm_errors(shape, offset).items():
        assert ours <= max(1e-6, 2 * torchs), name


@pytest.mark.parametrize("shape", [(2, 7, 1, 1), (2, 5)])
@pytest.mark.parametrize("offset", [0.0, 30.0])
def test_batch_norm_of_two_values_per_channel(shape: tuple[int, ...], offset: float) -> None:
    # Two values are normalised to -1 and 1 whatever they are: the gradient is what epsilon leaves of it, thousands of
    # times smaller than what it is the difference of. One draw says little about which float32 result is nearer.
    draws = [_batch_norm_errors(shape, offset, seed) for seed in range(15)]
    for name in draws[0]:
        ours, torchs = np.median([d[name] for d in draws], axis=0)
        assert ours <= max(1e-6, 2 * torchs), name


def _batch_norm_errors(shape: tuple[int, ...], offset: float, seed: int = 0) -> dict[str, tuple[float, float]]:
    """How far from float64 result and gradients are, ours and torch's in float32."""
    c = shape[1]
    data = {"x": normal(*shape, seed=seed, offset=offset), "w": normal(c, seed=seed + 1), "b": normal(c, seed=seed + 2)}
    dy = normal(*shape, seed=seed + 3)

    def oracle(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return F.batch_norm(x, None, None, w, b, training=True)

    exact, usual = (reference(oracle, data, t, dy) for t in (torch.float64, torch.float32))
    feeds = {**data, "dy": dy, "m": np.zeros(c, np.float32), "v": np.ones(c, np.float32)}
    got = _batch_norm(data, ("N", "c", *shape[2:])).run(feeds)
    return {name: (error(got[name], value), error(usual[name], value)) for name, value in exact.items()}


def _batch_norm(data: Arrays, shape: tuple[int | str, ...]) -> OnnxSession:
    c = data["w"].size
    axes = (Axis((Segment(0, 0, c),)),)
    kinds = {"w": "norm_scale", "b": "norm_bias", "m": "stat_mean", "v": "stat_var"}
    specs = tuple(TensorSpec(n, TensorKind(k), axes) for n, k in kinds.items())
    arch = Architecture("op", (ChannelGroup("c", c),), specs, (), (), (1,), (1,))
    graph = Graph(nodes=[node("BatchNormalization", "x", "w", "b", "m", "v", epsilon=1e-5)])
    graph.outputs = [Port("y", np.dtype(np.float32), ())]
    out = Graph()
    tape = Tape(Model(graph, arch), out)
    out.inputs = [Port("x", np.dtype(np.float32), shape)]
    tape.enter("x", "x", shape, needs_gradient=True)
    for spec in specs:
        out.inputs.append(Port(spec.name, np.dtype(np.float32), tape.tensor_shape(spec)))
        tape.enter(spec.name, spec.name, tape.tensor_shape(spec), needs_gradient=spec.kind.is_trainable)
    tape.forward()
    out.inputs.append(Port("dy", np.dtype(np.float32), shape))
    tape.add_gradient("y", "dy")
    tape.backward()
    out.emit("Identity", tape.value("y"), out="result")
    out.outputs.append(Port("result", np.dtype(np.float32), shape))
    for name in data:
        out.emit("Identity", tape.gradient(name) or "", out=f"{name}::gradient")
        out.outputs.append(Port(f"{name}::gradient", np.dtype(np.float32), tape.shape(name)))
    return OnnxSession(out.to_bytes(), training=True)


# -- convolution ----------------------------------------------------------------------------------------------------


@st.composite
def convolution_cases(draw: st.DrawFn, ranks: tuple[int, ...] = (1, 2, 2)) -> dict[str, Any]:
    rank = draw(st.sampled_from(ranks))
    each = lambda low, high: tuple(draw(st.integers(low, high)) for _ in range(rank))  # noqa: E731
    largest = {1: 40, 2: 9, 3: 6}[rank]  # maps of few and of many places, which are differentiated in different ways
    kernel = each(1, 4 if rank < 3 else 3)
    case = {
        "batch": draw(st.integers(2, 4)),
        "inputs": draw(st.integers(1, 5)),
        "outputs": draw(st.integers(1, 5)),
        "size": each(4, largest),
        "kernel": kernel,
        "strides": each(1, 3) if draw(st.booleans()) else (1,) * rank,
        "dilations": each(1, 2),
        "pads": tuple((draw(st.integers(0, k)), draw(st.integers(0, k))) for k in kernel),
        "bias": draw(st.booleans()),
    }
    spans = [d * (k - 1) + 1 for d, k in zip(case["dilations"], kernel, strict=True)]
    assume(all(s + sum(p) >= n for s, p, n in zip(case["size"], case["pads"], spans, strict=True)))
    return case


LARGE_KERNEL = {
    "batch": 2, "inputs": 3, "outputs": 4, "size": (12, 11), "kernel": (5, 5), "strides": (2, 1), "dilations": (1, 2),
    "pads": ((2, 1), (0, 3)), "bias": True,
}  # fmt: skip
"""Of few channels: its kernel's gradient is a convolution over the batch."""

CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def check_convolution(
    case: dict[str, Any], groups: int = 1, inputs: int | str = "c", outputs: int | str = "o", inside: int | str = "c"
) -> None:
    """A convolution against torch, told how many groups are left, at full width and with two channels less."""
    rank = len(case["size"])
    data = {
        "x": normal(case["batch"], case["inputs"], *case["size"]),
        "w": normal(case["outputs"], case["inputs"] // groups, *case["kernel"], seed=1),
    }
    shapes: dict[str, tuple[int | str, ...]] = {
        "x": ("N", inputs, *case["size"]),
        "w": (outputs, inside, *case["kernel"]),
    }
    if case["bias"]:
        data["b"], shapes["b"] = normal(case["outputs"], seed=2), shapes["w"][:1]
    flat = [p for pad in reversed(case["pads"]) for p in pad]

    def oracle(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None = None) -> torch.Tensor:
        left = x.shape[1] // w.shape[1]
        return CONVOLUTIONS[rank](F.pad(x, flat), w, b, case["strides"], 0, case["dilations"], left)

    attrs = {
        "kernel_shape": list(case["kernel"]),
        "strides": list(case["strides"]),
        "dilations": list(case["dilations"]),
        "pads": [p[0] for p in case["pads"]] + [p[1] for p in case["pads"]],
        "group": groups,
    }
    narrow = {name: max(1, size - 2) for name, size in Symbols(data, shapes).sizes.items()}
    check([node("Conv", *data, **attrs)], oracle, data, shapes, sums=True, narrow=narrow)


@settings(max_examples=100, deadline=None)
@given(case=convolution_cases((1, 2, 2, 2, 3)))
@example(case=LARGE_KERNEL)
@example(case={**LARGE_KERNEL, "inputs": 5})
@example(case={**LARGE_KERNEL, "strides": (1, 1)})
def test_convolution(case: dict[str, Any]) -> None:
    check_convolution(case)


@settings(max_examples=50, deadline=None)
@given(case=convolution_cases((1, 2, 2, 3)), longer=st.sampled_from([0, 66]))
def test_depthwise_convolution_of_any_width(longer: int, case: dict[str, Any]) -> None:
    """Of small maps, of lines, and of lines that are so long that they are cut into blocks."""
    channels, (*sizes, last) = case["inputs"] + 1, case["size"]
    case = {**case, "size": (*sizes, last + longer), "inputs": channels, "outputs": channels}
    check_convolution(case, channels, "c", "c", 1)


@pytest.mark.parametrize("cut", ["groups", "positions", "nothing"])
@settings(max_examples=25, deadline=None)
@given(
    case=convolution_cases((1, 2, 2, 3)),
    groups=st.integers(2, 4),
    group_inputs=st.integers(1, 3),
    group_outputs=st.integers(1, 3),
)
def test_convolution_in_groups(
    cut: str, case: dict[str, Any], groups: int, group_inputs: int, group_outputs: int
) -> None:
    case = {**case, "inputs": groups * group_inputs, "outputs": groups * group_outputs}
    if cut == "groups":
        check_convolution(case, groups, f"g*{group_inputs}", f"g*{group_outputs}", group_inputs)
    elif cut == "positions":
        check_convolution(case, groups, f"{groups}*i", f"{groups}*o", "i")
    else:
        check_convolution(case, groups, groups * group_inputs, groups * group_outputs, group_inputs)


@pytest.mark.parametrize("mode", ["SAME_UPPER", "SAME_LOWER", "VALID"])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("stride", [1, 2])
def test_convolution_that_pads_by_itself(mode: str, groups: int, stride: int) -> None:
    data = {"x": normal(2, 4, 7, 8), "w": normal(4, 4 // groups, 4, 3, seed=1)}

    def oracle(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        flat = []
        for size, k in ((8, 3), (7, 4)):  # the last axis first
            total = max((-(-size // stride) - 1) * stride + k - size, 0) if mode != "VALID" else 0
            small, large = total // 2, total - total // 2
            flat += [small, large] if mode == "SAME_UPPER" else [large, small]
        return F.conv2d(F.pad(x, flat), w, None, stride, groups=groups)

    conv = node("Conv", "x", "w", kernel_shape=[4, 3], strides=[stride] * 2, auto_pad=mode, group=groups)
    check([conv], oracle, data, sums=True)


def test_groups_that_are_cut_unevenly_are_refused_by_name() -> None:
    data = {"x": normal(2, 4, 5, 5), "w": normal(6, 2, 3, 3)}
    with pytest.raises(ModelError, match="the_Conv"):
        gradient_session([node("Conv", "x", "w", group=2)], data, {"x": ("N", "c", 5, 5), "w": ("o", 2, 3, 3)}, {})
