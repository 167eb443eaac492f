"""Gradients of transposed convolutions against torch in float64."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fedprune.core.errors import ModelError
from fedprune.runtime.session import OnnxSession
from fedprune_export.ir.graph import Graph, Port
from support.oracles.differentiation import Symbols, check, gradient_session, node, normal

pytestmark = pytest.mark.torch

F = torch.nn.functional
TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    rank = draw(st.sampled_from((1, 2, 2, 3)))
    each = lambda low, high: tuple(draw(st.integers(low, high)) for _ in range(rank))  # noqa: E731
    kernel, strides, dilations = each(1, 4 if rank < 3 else 3), each(1, 3), each(1, 2)
    case = {
        "size": each(1, 6 if rank < 3 else 3),
        "kernel": kernel,
        "strides": strides,
        "dilations": dilations,
        "pads": each(0, 2),
        "rest": tuple(draw(st.integers(0, s - 1)) for s in strides),
        "bias": draw(st.booleans()),
    }
    out = [
        s * (n - 1) + d * (k - 1) + 1 + r - 2 * p
        for s, n, d, k, r, p in zip(strides, case["size"], dilations, kernel, case["rest"], case["pads"], strict=True)
    ]
    assume(min(out) >= 1)
    return case


def check_transposed(case: dict[str, Any], groups: int, data: Any, dims: tuple[Any, Any, Any]) -> None:
    """Against torch, told how many groups are left, at full width and with two channels less."""
    rank = len(case["size"])
    inputs, inside, outputs = dims
    shapes: dict[str, tuple[int | str, ...]] = {
        "x": ("N", inputs, *case["size"]),
        "w": (inputs, inside, *case["kernel"]),
    }
    if case["bias"]:
        shapes["b"] = (outputs,)
    else:
        del data["b"]
    before = data["x"].shape[1] // groups

    def oracle(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None = None) -> torch.Tensor:
        left = x.shape[1] // before if isinstance(inside, int) and groups > 1 else groups
        return TRANSPOSED[rank](x, w, b, case["strides"], case["pads"], case["rest"], left, case["dilations"])

    attrs = {
        "kernel_shape": list(case["kernel"]),
        "strides": list(case["strides"]),
        "dilations": list(case["dilations"]),
        "pads": [*case["pads"], *case["pads"]],
        "output_padding": list(case["rest"]),
        "group": groups,
    }
    narrow = {name: max(1, size - 2) for name, size in Symbols(data, shapes).sizes.items()}
    check([node("ConvTranspose", *data, **attrs)], oracle, data, shapes, sums=True, narrow=narrow)


def random_arrays(case: dict[str, Any], inputs: int, inside: int, groups: int) -> dict[str, np.ndarray[Any, Any]]:
    return {
        "x": normal(3, inputs, *case["size"]),
        "w": normal(inputs, inside, *case["kernel"], seed=1),
        "b": normal(inside * groups, seed=2),
    }


@settings(max_examples=60, deadline=None)
@given(case=cases(), inputs=st.integers(1, 5), outputs=st.integers(1, 5))
def test_transposed_convolution(case: dict[str, Any], inputs: int, outputs: int) -> None:
    check_transposed(case, 1, random_arrays(case, inputs, outputs, 1), ("i", "o", "o"))


@settings(max_examples=50, deadline=None)
@given(case=cases(), channels=st.integers(2, 5), longer=st.sampled_from([0, 66]))
def test_depthwise_transposed_convolution(case: dict[str, Any], channels: int, longer: int) -> None:
    *sizes, last = case["size"]
    case = {**case, "size": (*sizes, last + longer)}
    check_transposed(case, channels, random_arrays(case, channels, 1, channels), ("c", 1, "c"))


@pytest.mark.parametrize("cut", ["groups", "positions"])
@settings(max_examples=25, deadline=None)
@given(case=cases(), groups=st.integers(2, 4), group_inputs=st.integers(1, 3), group_outputs=st.integers(1, 3))
def test_transposed_convolution_in_groups(
    cut: str, case: dict[str, Any], groups: int, group_inputs: int, group_outputs: int
) -> None:
    axes_by_group = (f"g*{group_inputs}", group_outputs, f"g*{group_outputs}")
    inside = (f"{groups}*i", "o", f"{groups}*o")
    check_transposed(
        case,
        groups,
        random_arrays(case, groups * group_inputs, group_outputs, groups),
        axes_by_group if cut == "groups" else inside,
    )


@pytest.mark.parametrize("mode", ["NOTSET", "SAME_UPPER", "SAME_LOWER", "VALID"])
@pytest.mark.parametrize(
    ("strides", "shape"), [([2, 3], None), ([2, 3], [9, 12]), ([2, 3], [10, 11]), ([1, 2], None), ([1, 2], [7, 10])]
)
def test_padding_that_follows_from_the_output_is_onnxruntimes(
    mode: str, shape: list[int] | None, strides: list[int]
) -> None:
    data = {"x": normal(2, 3, 5, 4), "w": normal(3, 2, 4, 5, seed=1)}
    attrs: dict[str, Any] = {"kernel_shape": [4, 5], "strides": strides, "auto_pad": mode}
    if shape:
        attrs["output_shape"] = shape
    layer = node("ConvTranspose", "x", "w", **attrs)
    graph = Graph(nodes=[layer])
    graph.inputs = [Port(n, a.dtype, a.shape) for n, a in data.items()]
    graph.outputs = [Port("y", np.dtype(np.float32), (None,) * 4)]
    want = OnnxSession(graph.to_bytes()).run(data)["y"]
    session = gradient_session([layer], data, {n: a.shape for n, a in data.items()}, {})
    got = session.run({**data, "dy": normal(*want.shape)})
    np.testing.assert_allclose(got["result"], want, rtol=1e-5, atol=1e-5)
    dy = normal(*want.shape)
    assert got["x::gradient"].shape == data["x"].shape
    # Both are linear in x: the pull-back of dy, times x, is dy times the result.
    np.testing.assert_allclose((got["x::gradient"] * data["x"]).sum(), (dy * want).sum(), rtol=1e-4)


def test_padding_that_leaves_nothing_is_refused_by_name() -> None:
    data = {"x": normal(2, 3, 1, 4), "w": normal(3, 2, 2, 2, seed=1)}
    layer = node("ConvTranspose", "x", "w", kernel_shape=[2, 2], pads=[1, 1, 1, 1])
    with pytest.raises(ModelError, match="the_ConvTranspose"):
        gradient_session([layer], data, {n: a.shape for n, a in data.items()}, {})
