"""Random small networks, cut anywhere, equal the masked originals."""

from hypothesis import given, settings
from hypothesis import strategies as st

from fedprune_export.pruning.model import Model
from support.nets.random_nets import mixing_nets, nets
from support.oracles.cutting import cut_error, random_selection


@settings(max_examples=60, deadline=None)
@given(model=nets(), density=st.sampled_from([0.01, 0.3, 0.5, 0.8]), seed=st.integers(0, 99))
def test_cut_equals_masked(model: Model, density: float, seed: int) -> None:
    assert model.architecture.groups
    assert cut_error(model, random_selection(model, density, seed), batch=4) < 1e-5


@settings(max_examples=80, deadline=None)
@given(model=mixing_nets(), density=st.sampled_from([0.01, 0.3, 0.5, 0.8]), seed=st.integers(0, 99))
def test_a_cut_of_mixed_channels_equals_masked(model: Model, density: float, seed: int) -> None:
    assert model.architecture.groups
    assert cut_error(model, random_selection(model, density, seed), batch=4) < 1e-5
