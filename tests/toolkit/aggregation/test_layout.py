"""Submodels as whole tensors in another layout, some rows at a time."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedprune.aggregation.layout import Expansion, to_global
from fedprune.aggregation.update_coverage import coverage_mass
from fedprune.model.selection import Selection
from support.nets.drawn_models import architectures, model, ranks, seeds, selections

pytestmark = pytest.mark.board


@settings(max_examples=40)
@given(st.data(), seeds, st.integers(1, 5), st.booleans(), st.sampled_from([0.0, np.inf]))
def test_rows_are_those_of_the_scattered_submodel(
    data: st.DataObject, seed: int, step: int, given_memory: bool, absent: float
) -> None:
    architecture = data.draw(architectures())
    layout = Selection.of(architecture, architecture.sizes, data.draw(st.none() | ranks(architecture)))
    selection = data.draw(selections(architecture))
    submodel = selection.gather(model(architecture, seed))
    for spec in architecture.tensors:
        if not spec.axes:
            continue
        expected = np.full(spec.shape, absent, np.float32)
        expected[np.ix_(*selection.maps(spec.name))] = submodel[spec.name]
        expansion = Expansion(layout, spec, selection, submodel[spec.name], absent)
        got = np.empty(spec.shape, np.float32)
        for start in range(0, spec.shape[0], step):
            stop = min(spec.shape[0], start + step)
            memory = np.full((stop - start, *spec.shape[1:]), 7, np.float32) if given_memory else None
            got[start:stop] = expansion.rows(start, stop, memory)
        assert to_global(got, spec, layout).tobytes() == expected.tobytes()


@settings(max_examples=30)
@given(st.data(), st.lists(st.integers(1, 1000), min_size=1, max_size=4))
def test_mass_is_the_weight_of_those_that_hold_a_coordinate(data: st.DataObject, weights: list[int]) -> None:
    architecture = data.draw(architectures())
    layout = Selection.of(architecture, architecture.sizes, data.draw(st.none() | ranks(architecture)))
    shares = [(data.draw(selections(architecture)), n) for n in weights]
    for spec in architecture.tensors:
        expected = np.zeros(spec.shape, np.int64)
        for selection, n in shares:
            expected[np.ix_(*selection.maps(spec.name)) if spec.axes else ...] += n
        mass = coverage_mass(layout, spec, shares)
        full_mass = np.full(spec.shape, sum(weights)) if mass is None else np.array(np.broadcast_to(mass, spec.shape))
        assert np.array_equal(to_global(full_mass, spec, layout), expected)
