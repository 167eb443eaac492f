"""Ordered dropout: narrower steps are the narrower submodels of the same ranks, and nothing else moves."""

from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from fedprune.model.architecture import Architecture, Axis, ChannelGroup, Segment, TensorKind, TensorSpec
from fedprune.model.nested_widths import TensorAxes, axes_json
from support.nets.drawn_models import architectures, model, seeds, selections

pytestmark = pytest.mark.board

WEIGHT = TensorKind.WEIGHT
CONCAT = Architecture(
    "concat",
    (ChannelGroup("a", 4), ChannelGroup("b", 6)),
    (
        TensorSpec("one", WEIGHT, (Axis((Segment(0, 0, 4),)), Axis.fixed(3))),
        # A flattened concatenation: both groups, the first one twice, with fixed indices between them.
        TensorSpec(
            "two",
            WEIGHT,
            (Axis.fixed(2), Axis((Segment(0, 0, 4, 2), Segment(-1, 0, 3), Segment(1, 0, 6), Segment(0, 0, 4)))),
        ),
    ),
    (),
    (),
    (3,),
    (2,),
)
SHUFFLED = Architecture(
    "shuffled",
    (ChannelGroup("a", 4), ChannelGroup("b", 6), ChannelGroup("c", 8)),
    (
        TensorSpec("one", WEIGHT, (Axis((Segment(0, 2, 2), Segment(1, 0, 6), Segment(0, 0, 2))),)),
        TensorSpec("two", WEIGHT, (Axis((Segment(1, 0, 6), Segment(2, 0, 8))),)),
    ),
    (),
    (),
    (3,),
    (2,),
)


def axes_of(architecture: Architecture) -> TensorAxes:
    return TensorAxes.from_json(axes_json(architecture))


def test_the_text_says_what_the_architecture_says() -> None:
    axes = axes_of(CONCAT)
    assert axes.sizes == CONCAT.sizes
    assert axes.axes == {t.name: t.axes for t in CONCAT.tensors}


@given(st.data(), seeds)
def test_a_narrower_step_trains_the_narrower_submodel(data: st.DataObject, seed: int) -> None:
    """Whatever the ranks: what is cut out of a submodel is what would be cut out of the whole model."""
    architecture = data.draw(architectures() | st.just(CONCAT) | st.just(SHUFFLED))
    chosen = data.draw(selections(architecture))
    densities = data.draw(st.lists(st.floats(0.05, 1), max_size=3))
    axes, full = axes_of(architecture), model(architecture, seed)
    submodel = chosen.gather(full)
    axes.check(submodel, chosen.widths)
    for plan in axes.step_widths(chosen.widths, densities):
        narrow = chosen.with_widths(plan).gather(full)
        got = axes.narrow(submodel, chosen.widths, plan)
        assert {n: v.shape for n, v in got.items()} == {n: v.shape for n, v in narrow.items()}
        assert all(np.array_equal(got[n], narrow[n]) for n in narrow)


@given(st.data(), seeds)
def test_what_is_written_back_lands_where_it_was_taken(data: st.DataObject, seed: int) -> None:
    architecture = data.draw(architectures() | st.just(CONCAT))
    chosen = data.draw(selections(architecture))
    axes, submodel = axes_of(architecture), chosen.gather(model(architecture, seed))
    plan = axes.step_widths(chosen.widths, [0.5])[-1]
    assume(plan != chosen.widths)
    trained_tensors = {n: v + 1 for n, v in axes.narrow(submodel, chosen.widths, plan).items()}
    after = {n: v.copy() for n, v in submodel.items()}
    axes.write_back(after, trained_tensors, chosen.widths, plan)
    reread = axes.narrow(after, chosen.widths, plan)
    for name, value in trained_tensors.items():
        assert np.array_equal(reread[name], value)
        assert np.count_nonzero(after[name] != submodel[name]) == value.size


def test_plans_begin_with_the_devices_own_and_are_never_wider() -> None:
    axes = axes_of(CONCAT)
    assert axes.step_widths((3, 6), [1.0, 0.5, 0.5, 0.01]) == [(3, 6), (2, 3), (1, 1)]
    assert axes.step_widths((4, 6), []) == [(4, 6)]
    # 0.7 × 10 is a hair above 7: the same widths as an extraction at that density has.
    ten = axes_of(Architecture("ten", (ChannelGroup("a", 10),), (), (), (), (1,), (1,)))
    assert ten.step_widths((10,), [0.7]) == [(10,), (7,)]


def test_groups_that_lie_in_pieces_stay_whole() -> None:
    axes = axes_of(SHUFFLED)
    assert axes.narrowable_groups == {2}  # b lies whole, but where depends on how many of a's pieces are left before it
    assert axes.step_widths((4, 6, 8), [0.5]) == [(4, 6, 8), (4, 6, 4)]


def test_arrays_that_belong_to_a_tensor_are_cut_with_it() -> None:
    axes = axes_of(CONCAT)
    value = np.arange(12, dtype=np.float32).reshape(4, 3)
    fed: dict[str, Any] = {"one::momentum": value, "one::mu": np.array(2.0), "lr": np.array(0.1)}
    got = axes.narrow(fed, (4, 6), (2, 6))
    assert np.array_equal(got["one::momentum"], value[:2])
    assert got["one::mu"] == 2
    assert got["lr"] is fed["lr"]
