"""Selections: extraction, reconstruction, nesting, JSON."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedprune.core.errors import BundleError
from fedprune.model.architecture import Architecture
from fedprune.model.selection import Selection, mesh
from support.nets.drawn_models import architectures, model, perturb_submodel, seeds, selections
from support.nets.written_nets import written_net

pytestmark = pytest.mark.board

PAIR = written_net({"a": 3, "b": 2}, {"w": ("b", ("a", 2))}, (3,), (2,), layers=())


@given(st.data(), seeds)
def test_what_was_extracted_goes_back_to_its_place(data: st.DataObject, seed: int) -> None:
    architecture = data.draw(architectures())
    selection, full = data.draw(selections(architecture)), model(architecture, seed)
    restored = selection.scatter(selection.gather(full), full)
    assert all(restored[n].tobytes() == full[n].tobytes() for n in full)


@given(st.data(), seeds)
def test_what_was_scattered_can_be_extracted(data: st.DataObject, seed: int) -> None:
    architecture = data.draw(architectures())
    selection, full = data.draw(selections(architecture)), model(architecture, seed)
    submodel = perturb_submodel(selection, full, seed + 1)
    regathered = selection.gather(selection.scatter(submodel, full))
    assert all(regathered[n].tobytes() == submodel[n].tobytes() for n in submodel)


@given(st.data(), seeds)
def test_scattering_changes_covered_coordinates_only(data: st.DataObject, seed: int) -> None:
    architecture = data.draw(architectures())
    selection, full = data.draw(selections(architecture)), model(architecture, seed)
    changed_model = selection.scatter({n: v + np.float32(1) for n, v in selection.gather(full).items()}, full)
    for name, value in full.items():
        assert np.array_equal(changed_model[name] != value, selection.coverage_mask(name))


@given(st.data(), seeds)
def test_extraction_is_the_outer_product_of_its_maps(data: st.DataObject, seed: int) -> None:
    architecture = data.draw(architectures())
    selection, full = data.draw(selections(architecture)), model(architecture, seed)
    for name, submodel_tensor in selection.gather(full).items():
        expected = full[name]
        for axis, row in enumerate(selection.maps(name)):
            expected = np.stack([np.take(expected, i, axis=axis) for i in row], axis=axis)
        assert np.array_equal(submodel_tensor, expected)
        assert submodel_tensor.flags.c_contiguous
        assert not np.may_share_memory(submodel_tensor, full[name])


@given(st.data())
def test_narrower_selections_of_the_same_ranks_are_nested(data: st.DataObject) -> None:
    architecture = data.draw(architectures())
    wide = data.draw(selections(architecture))
    narrow = wide.with_widths([data.draw(st.integers(1, w)) for w in wide.widths])
    for spec in architecture.tensors:
        assert not (narrow.coverage_mask(spec.name) & ~wide.coverage_mask(spec.name)).any()
        for axis in spec.axes:
            if len(axis.segments) == 1:
                short = narrow.indices(axis)
                assert np.array_equal(wide.indices(axis)[: short.size], short)


@given(st.data())
def test_tied_axes_keep_the_same_channels(data: st.DataObject) -> None:
    architecture = data.draw(architectures())
    selection = data.draw(selections(architecture))
    for spec in architecture.tensors:
        for axis in spec.axes:
            selected_indices, offset = set(selection.indices(axis).tolist()), 0
            for s in axis.segments:
                if s.group >= 0:
                    kept_channels = set(selection.ranks[s.group][: selection.widths[s.group]].tolist())
                    for c in range(s.count):
                        positions = range(offset + c * s.inner, offset + (c + 1) * s.inner)
                        assert {p in selected_indices for p in positions} == {s.start + c in kept_channels}
                offset += s.length


@given(st.data())
def test_json_round_trip(data: st.DataObject) -> None:
    architecture = data.draw(architectures())
    selection = data.draw(selections(architecture))
    decoded = Selection.from_json(selection.to_json(), architecture)
    assert decoded.digest == selection.digest
    assert decoded.widths == selection.widths
    assert all(np.array_equal(a, b) for a, b in zip(decoded.ranks, selection.ranks, strict=True))


@given(st.data())
def test_the_digest_sees_widths_and_ranks(data: st.DataObject) -> None:
    architecture = data.draw(architectures())
    first, second = data.draw(selections(architecture)), data.draw(selections(architecture))
    same = first.widths == second.widths and all(
        np.array_equal(a, b) for a, b in zip(first.ranks, second.ranks, strict=True)
    )
    assert (first.digest == second.digest) == same


def test_ranks_cannot_be_changed_afterwards() -> None:
    selection = Selection.of(PAIR, (3, 2))
    with pytest.raises(ValueError, match="read-only"):
        selection.ranks[0][0] = 1


@pytest.mark.parametrize(
    "orders", [[[0, 1, 2]], [[0, 1, 1], [0, 1]], [[0, 1], [0, 1]], [[1, 2, 3], [0, 1]], [[0, 1, 2], [[0, 1]]]]
)
def test_ranks_that_are_no_permutations_are_refused(orders: list[Any]) -> None:
    with pytest.raises(BundleError, match="rank"):
        Selection.of(PAIR, (3, 2), orders)


def test_a_tensor_of_another_shape_is_refused_by_name() -> None:
    with pytest.raises(BundleError, match=r"shape of w: expected \(2, 6\), got \(6, 2\)"):
        Selection.full(PAIR).gather({"w": np.zeros((6, 2), np.float32)})


def test_a_selection_of_another_architecture_is_refused() -> None:
    foreign = Architecture("other", PAIR.groups, PAIR.tensors, (), (), (3,), (2,))
    with pytest.raises(BundleError, match="another architecture"):
        Selection.from_json(Selection.full(PAIR).to_json(), foreign)


@given(st.lists(st.lists(st.integers(0, 5), unique=True, max_size=6), min_size=1, max_size=3))
def test_a_mesh_indexes_the_outer_product(rows: list[list[int]]) -> None:
    maps = [np.array(r, np.int64) for r in rows]
    full = np.arange(6 ** len(maps)).reshape((6,) * len(maps))
    assert np.array_equal(full[mesh(maps)], full[np.ix_(*maps)])
