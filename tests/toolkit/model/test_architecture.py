"""Architectures: sizes, checks, JSON."""

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedprune.core.errors import BundleError
from fedprune.model.architecture import (
    FIXED,
    Architecture,
    Axis,
    ChannelGroup,
    Segment,
    TensorKind,
    TensorSpec,
    widths_at,
)
from fedprune.model.selection import Selection
from support.nets.drawn_models import architectures, widths
from support.nets.written_nets import written_net

pytestmark = pytest.mark.board

PLAIN = written_net(
    {"hidden": 4},
    {"fc1.weight": ("hidden", 3), "fc1.bias": ("hidden",), "fc2.weight": (2, "hidden")},
    (3,),
    (2,),
    kinds={"fc1.bias": TensorKind.BIAS},
)


def with_axis(*segments: Segment) -> Architecture:
    """PLAIN with another input axis of its second layer."""
    spec = TensorSpec("fc2.weight", TensorKind.WEIGHT, (Axis.fixed(2), Axis(segments)))
    return replace(PLAIN, tensors=(*PLAIN.tensors[:2], spec))


@given(st.data())
def test_json_round_trip(data: st.DataObject) -> None:
    architecture = data.draw(architectures())
    decoded = Architecture.from_json(architecture.to_json())
    assert decoded == architecture
    assert decoded.digest == architecture.digest


@given(st.data())
def test_sizes_follow_from_widths_as_selections_cut(data: st.DataObject) -> None:
    architecture = data.draw(architectures())
    chosen_widths = data.draw(widths(architecture))
    selection = Selection.of(architecture, chosen_widths)
    for spec in architecture.tensors:
        assert architecture.shape(spec.name, chosen_widths) == tuple(m.size for m in selection.maps(spec.name))


@given(st.data(), st.floats(0.001, 1.0))
def test_a_density_keeps_its_ceiling(data: st.DataObject, density: float) -> None:
    architecture = data.draw(architectures())
    for width, size in zip(widths_at(architecture, density), architecture.sizes, strict=True):
        assert 1 <= width <= size
        assert width - 1 < density * size + 1e-6
        assert width >= density * size - 1e-6


@pytest.mark.parametrize(("density", "expected_width"), [(0.7, 7), (0.1, 1), (0.25, 3), (0.01, 1), (1.0, 10)])
def test_a_density_that_gives_whole_channels_gives_those(density: float, expected_width: int) -> None:
    ten = replace(PLAIN, groups=(ChannelGroup("hidden", 10),), tensors=(), layers=())
    assert widths_at(ten, density) == (expected_width,)


@pytest.mark.parametrize(
    "variant",
    [
        replace(PLAIN, groups=(ChannelGroup("h", 4),)),
        replace(PLAIN, tensors=PLAIN.tensors[::-1]),
        replace(PLAIN, layers=(replace(PLAIN.layers[0], positions=2), PLAIN.layers[1])),
        replace(PLAIN, input_shape=(3, 1)),
    ],
)
def test_the_digest_sees_every_part(variant: Architecture) -> None:
    assert variant.digest != PLAIN.digest


@pytest.mark.parametrize(
    "broken",
    [
        with_axis(Segment(0, 0, 5)),
        with_axis(Segment(0, 0, 3)),
        with_axis(Segment(0, 0, 4), Segment(0, 0, 1)),
        with_axis(Segment(0, 0, 4, 0)),
        with_axis(Segment(0, 0, -4)),
        with_axis(Segment(1, 0, 4)),
        with_axis(Segment(FIXED, 0, 2**40)),
        replace(PLAIN, groups=(ChannelGroup("hidden", 0),)),
        replace(PLAIN, tensors=PLAIN.tensors * 2),
        replace(PLAIN, tensors=PLAIN.tensors[1:]),
        replace(PLAIN, layers=(replace(PLAIN.layers[0], output_axis=2),)),
        replace(PLAIN, output_shape=(-1,)),
        replace(PLAIN, tensors=(*PLAIN.tensors, TensorSpec("deep", TensorKind.WEIGHT, (Axis.fixed(1),) * 9))),
    ],
)
def test_parts_that_contradict_each_other_are_refused(broken: Architecture) -> None:
    with pytest.raises(BundleError):
        broken.validate()


def test_a_claim_of_two_thousand_million_channels_is_checked_at_once() -> None:
    body = json.loads(PLAIN.to_json())
    body["groups"] = [["hidden", 2**31 - 1]]
    for tensor in body["tensors"]:
        tensor["axes"] = [[[0, 0, 2**31 - 1, 1]]]
    assert Architecture.from_json(json.dumps(body)).sizes == (2**31 - 1,)


@pytest.mark.parametrize("value", [None, 1.5, True, -1])
def test_hostile_values_are_refused(value: object) -> None:
    body = json.loads(PLAIN.to_json())
    for changed in ({"groups": [["hidden", value]]}, {"input_shape": [value]}, {"tensors": value}):
        with pytest.raises(BundleError):
            Architecture.from_json(json.dumps({**body, **changed}))


@given(st.integers(0, 10_000), st.integers(0, 255))
def test_a_changed_byte_is_refused_or_gives_another_digest(position: int, byte: int) -> None:
    raw = bytearray(PLAIN.to_json().encode())
    position %= len(raw)
    changed = raw[position] != byte
    raw[position] = byte
    try:
        decoded = Architecture.from_json(bytes(raw))
    except BundleError:
        return
    assert (decoded.digest != PLAIN.digest) == changed


def test_a_layer_weight_counts_on_its_output_axis_and_others_on_all() -> None:
    turned = replace(PLAIN, layers=(replace(PLAIN.layers[0], output_axis=1),))
    assert [turned.output_axes(t.name) for t in turned.tensors] == [(1,), (0,), (0, 1)]


def test_a_flattened_channel_takes_its_inner_indices() -> None:
    axis = Axis((Segment(0, 0, 4, 9), Segment(FIXED, 0, 2)))
    assert axis.size((3,), (4,)) == 29
    assert axis.length == 38
    assert np.array_equal(Selection.of(with_axis(*axis.segments), (1,)).indices(axis), [*range(9), 36, 37])
