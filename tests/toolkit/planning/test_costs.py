"""Costs against numbers that come from elsewhere: torch's own counter, sizes of encoded files, sums by hand."""

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedprune.core import tensorfile
from fedprune.core.errors import BundleError
from fedprune.model.architecture import (
    Activation,
    Architecture,
    Axis,
    ChannelGroup,
    LayerRow,
    Segment,
    TensorKind,
    TensorSpec,
    widths_at,
)
from fedprune.model.features import Features
from fedprune.model.selection import Selection
from fedprune.planning.costs import active_macs_share, costs_at, memory_seconds
from fedprune.planning.kernel_workload import workload

PLAIN = Features()
BRIEF = settings(max_examples=50, deadline=None)


def convnet(channels: Sequence[int], side: int = 16, inputs: int = 3, classes: int = 10) -> Architecture:
    """3×3 convolutions with batch normalisation and ReLU, each followed by a 2×2 pool; flatten; one linear layer."""
    groups = tuple(ChannelGroup(f"conv{i}", c) for i, c in enumerate(channels))
    tensors: list[TensorSpec] = []
    layers: list[LayerRow] = []
    values: list[Activation] = []
    before = Axis.fixed(inputs)
    for i, count in enumerate(channels):
        axis = Axis((Segment(i, 0, count),))
        square = side * side
        tensors.append(TensorSpec(f"conv{i}.weight", TensorKind.WEIGHT, (axis, before, Axis.fixed(3), Axis.fixed(3))))
        for suffix, kind in (
            ("scale", TensorKind.NORM_SCALE),
            ("bias", TensorKind.NORM_BIAS),
            ("mean", TensorKind.STAT_MEAN),
            ("var", TensorKind.STAT_VAR),
        ):
            tensors.append(TensorSpec(f"bn{i}.{suffix}", kind, (axis,)))
        layers.append(LayerRow(f"conv{i}", "Conv", f"conv{i}.weight", square))
        values += [
            Activation(f"conv{i}", axis, square, True),
            Activation(f"bn{i}", axis, square, False),
            Activation(f"relu{i}", axis, square, True),
        ]
        side //= 2
        values.append(Activation(f"pool{i}", axis, side * side, True))
        before = axis
    flat = Axis((Segment(len(channels) - 1, 0, channels[-1], side * side),))
    tensors.append(TensorSpec("fc.weight", TensorKind.WEIGHT, (Axis.fixed(classes), flat)))
    tensors.append(TensorSpec("fc.bias", TensorKind.BIAS, (Axis.fixed(classes),)))
    layers.append(LayerRow("fc", "Gemm", "fc.weight", 1))
    values.append(Activation("logits", Axis.fixed(classes), 1, True))
    side = int(layers[0].positions ** 0.5)
    return Architecture(
        "convnet", groups, tuple(tensors), tuple(layers), tuple(values), (inputs, side, side), (classes,)
    )


NET = convnet((8, 16))


@st.composite
def nets(draw: st.DrawFn) -> Architecture:
    return convnet(draw(st.lists(st.integers(1, 24), min_size=1, max_size=3)), draw(st.sampled_from([8, 16])))


@st.composite
def nets_at_two_widths(draw: st.DrawFn) -> tuple[Architecture, tuple[int, ...], tuple[int, ...]]:
    net = draw(nets())
    wide = tuple(draw(st.integers(1, n)) for n in net.sizes)
    return net, tuple(draw(st.integers(1, n)) for n in wide), wide


@pytest.mark.board
@given(nets_at_two_widths())
@BRIEF
def test_wire_bytes_are_the_size_of_the_encoded_file(
    case: tuple[Architecture, tuple[int, ...], tuple[int, ...]],
) -> None:
    net, widths, _ = case
    tensors = {name: np.zeros(shape, np.float32) for name, shape in net.shapes(widths).items()}
    costs = costs_at(net, widths)
    assert costs.wire_bytes == len(tensorfile.encode(tensors))
    assert costs.parameters == sum(t.size for t in tensors.values())
    assert costs.parameter_bytes == sum(t.nbytes for t in tensors.values())


@pytest.mark.board
@given(nets_at_two_widths(), st.integers(1, 64))
@BRIEF
def test_no_cost_shrinks_when_a_width_grows(
    case: tuple[Architecture, tuple[int, ...], tuple[int, ...]], batch: int
) -> None:
    net, narrow, wide = case
    narrow_costs, wide_costs = costs_at(net, narrow), costs_at(net, wide)
    assert all(getattr(narrow_costs, name) <= getattr(wide_costs, name) for name in vars(narrow_costs))
    assert narrow_costs.training_memory(batch, PLAIN, 100).total <= wide_costs.training_memory(batch, PLAIN, 100).total
    assert narrow_costs.inference_bytes(batch) <= wide_costs.inference_bytes(batch)
    assert memory_seconds(net, narrow, batch, 1e9) <= memory_seconds(net, wide, batch, 1e9)


@pytest.mark.board
def test_activations_of_a_small_net_by_hand() -> None:
    costs = costs_at(NET, (4, 5))
    maps = [4 * 256] * 3 + [4 * 64] + [5 * 64] * 3 + [5 * 16, 10]
    unkept = [4 * 256, 5 * 64]
    assert workload(NET).element_counts((4, 5))[0] == sum(maps)
    assert costs.activation_bytes == 4 * sum(maps)
    assert costs.kept_bytes == 4 * (sum(maps) - sum(unkept))
    assert costs.largest_bytes == 4 * 4 * 256
    assert costs.sample_bytes == 4 * 3 * 16 * 16


@pytest.mark.torch
@pytest.mark.parametrize("density", [1.0, 0.5, 0.2])
def test_multiplications_are_what_torch_counts(density: float) -> None:
    import torch
    from torch import nn
    from torch.utils.flop_counter import FlopCounterMode

    net = convnet((8, 12, 20))
    widths = widths_at(net, density)
    modules: list[nn.Module] = []
    before = 3
    for width in widths:
        modules += [nn.Conv2d(before, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        modules.append(nn.MaxPool2d(2))
        before = width
    model = nn.Sequential(*modules, nn.Flatten(), nn.Linear(before * 4, 10))
    with FlopCounterMode(display=False) as forward:
        loss = model(torch.zeros(1, 3, 16, 16) + 0.5).sum()
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    costs = costs_at(net, widths)
    assert 2 * costs.forward_macs == forward.get_total_flops()
    assert 2 * (costs.training_macs - costs.forward_macs) == backward.get_total_flops()
    parameter_count = sum(t.numel() for n, t in model.state_dict().items() if not n.endswith("num_batches_tracked"))
    assert costs.parameters == parameter_count


@BRIEF
@given(nets(), st.data())
def test_masking_all_weights_of_some_channels_leaves_the_macs_of_the_narrower_model(
    net: Architecture, data: st.DataObject
) -> None:
    widths = [data.draw(st.integers(1, n)) for n in net.sizes]
    mask = {layer.weight: Selection.of(net, widths).coverage_mask(layer.weight) for layer in net.layers}
    full_macs, narrow_macs = costs_at(net, net.sizes).training_macs, costs_at(net, widths).training_macs
    assert active_macs_share(net, net.sizes, mask) == pytest.approx(narrow_macs / full_macs)
    assert active_macs_share(net, net.sizes, {}) == 1
    with pytest.raises(BundleError):
        active_macs_share(net, net.sizes, {"fc.weight": np.ones((1, 1), np.bool_)})
