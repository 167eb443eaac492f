"""Element masks: prefixes of one order, of exactly the size that was asked for, in every submodel's coordinates."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedprune.core.errors import BundleError
from fedprune.model.architecture import Architecture
from fedprune.model.element_mask import (
    apply_mask,
    gather_mask,
    mask_from_bits,
    mask_to_bits,
    pack_active,
    unpack_active,
)
from fedprune.model.selection import ElementMask, Selection, Tensors, check_mask
from fedprune.strategies.aggregators import intersection
from fedprune.strategies.importance.element_ranking import (
    magnitudes,
    mask_threshold,
    prunable,
    quantile,
    top_mask,
    with_floors,
)
from support.nets.drawn_models import architectures, model, seeds, selections

pytestmark = pytest.mark.board

densities = st.floats(0.001, 1.0)


def random_mask(architecture: Architecture, seed: int, share: float = 0.5) -> ElementMask:
    random = np.random.default_rng(seed)
    return {n: random.random(architecture.by_name[n].shape) < share for n in prunable(architecture)}


def coarse(architecture: Architecture, seed: int) -> Tensors:
    """Importances with many that are equal."""
    weights = model(architecture, seed)
    return {n: np.round(np.abs(weights[n]), 0).astype(np.float32) for n in prunable(architecture)}


def count(mask: ElementMask) -> int:
    return sum(int(np.count_nonzero(bits)) for bits in mask.values())


def is_submask(inner: ElementMask, outer: ElementMask) -> bool:
    return all(not (bits & ~outer[n]).any() for n, bits in inner.items())


@given(architectures(), seeds, densities, densities)
def test_masks_are_nested_and_as_large_as_asked_for(
    architecture: Architecture, seed: int, first_density: float, second_density: float
) -> None:
    order = coarse(architecture, seed)
    size = sum(v.size for v in order.values())
    sparse, dense = (top_mask(order, d) for d in sorted((first_density, second_density)))
    assert is_submask(sparse, dense)
    for mask, density in ((sparse, min(first_density, second_density)), (dense, max(first_density, second_density))):
        assert count(mask) == max(1, int(density * size + 1e-6))
        kept_ranks = np.concatenate([order[n][m] for n, m in mask.items()])
        lost = np.concatenate([order[n][~m] for n, m in mask.items()])
        assert not lost.size or kept_ranks.min() >= lost.max()


@given(architectures(), seeds, st.floats(0, 1), densities, densities)
def test_floors_hold_in_every_tensor_and_masks_stay_nested(
    architecture: Architecture, seed: int, share: float, first_density: float, second_density: float
) -> None:
    weights = model(architecture, seed)
    order = coarse(architecture, seed + 1)
    floored = with_floors(order, weights, share)
    sparse, dense = (top_mask(floored, d) for d in sorted((first_density, second_density)))
    assert is_submask(sparse, dense)
    for name, mask in sparse.items():
        if not share or not mask.size:
            continue
        floor_count = max(1, int(share * mask.size + 1e-6))
        assert np.count_nonzero(mask) >= floor_count
        largest = np.sort(np.abs(weights[name]).reshape(-1))[::-1][floor_count - 1]
        assert mask[np.abs(weights[name]) > largest].all()
    floor_count = sum(int(np.count_nonzero(np.isinf(v))) for v in floored.values())
    assert count(sparse) == max(
        floor_count, max(1, int(min(first_density, second_density) * sum(m.size for m in sparse.values()) + 1e-6))
    )
    for name, value in order.items():
        np.testing.assert_array_equal(value[np.isfinite(floored[name])], floored[name][np.isfinite(floored[name])])


def test_an_importance_that_is_no_number_is_refused_by_name() -> None:
    with pytest.raises(BundleError, match="elements of b"):
        top_mask({"a": np.ones(3, np.float32), "b": np.array([1, np.nan], np.float32)}, 0.5)


@given(architectures(), seeds, densities)
def test_the_threshold_parts_what_is_active_from_what_is_not(
    architecture: Architecture, seed: int, density: float
) -> None:
    order = magnitudes(model(architecture, seed), prunable(architecture))
    mask = top_mask(order, density)
    theta = mask_threshold(order, mask)
    for name, value in order.items():  # normal numbers: no two are equal
        np.testing.assert_array_equal(value >= np.float32(theta), mask[name])


@given(st.data(), architectures(), seeds)
def test_a_submodels_mask_is_the_global_one_where_its_elements_live(
    data: st.DataObject, architecture: Architecture, seed: int
) -> None:
    selection: Selection = data.draw(selections(architecture))
    mask, weights = random_mask(architecture, seed), model(architecture, seed)
    inside = gather_mask(mask, selection)
    check_mask(inside, selection.shapes())
    for name, value in selection.gather(apply_mask(mask, weights)).items():
        np.testing.assert_array_equal(value, apply_mask(inside, selection.gather(weights))[name])


@given(architectures(), seeds)
def test_packing_loses_nothing_but_what_is_masked(architecture: Architecture, seed: int) -> None:
    mask, weights = random_mask(architecture, seed), model(architecture, seed)
    packed = pack_active(mask, weights)
    assert sum(packed[n].size for n in mask) == count(mask)
    for name, value in unpack_active(mask, packed).items():
        np.testing.assert_array_equal(value, apply_mask(mask, weights)[name])
    unpacked = mask_from_bits(mask_to_bits(mask), {t.name: t.shape for t in architecture.tensors})
    assert unpacked.keys() == mask.keys()
    assert all(np.array_equal(m, mask[n]) for n, m in unpacked.items())
    assert sum(b.size for b in mask_to_bits(mask).values()) == sum(-(-m.size // 8) for m in mask.values())


@given(architectures(), seeds)
def test_an_intersection_is_that_of_active_elements(architecture: Architecture, seed: int) -> None:
    first, second = random_mask(architecture, seed), random_mask(architecture, seed + 1)
    second = dict(list(second.items())[1:])  # a tensor that is active as a whole
    shapes = {t.name: t.shape for t in architecture.tensors}

    def whole(mask: ElementMask, name: str) -> np.ndarray[tuple[int, ...], np.dtype[np.bool_]]:
        return mask.get(name, np.ones(shapes[name], np.bool_))

    both = intersection(first, second)
    for name in shapes:
        np.testing.assert_array_equal(whole(both, name), whole(first, name) & whole(second, name))


def test_masks_that_do_not_fit_are_refused() -> None:
    mask = {"w": np.ones((8, 4), np.bool_)}
    with pytest.raises(BundleError, match="mask of w"):
        check_mask(mask, {"w": (4, 8)})
    with pytest.raises(BundleError, match="active values of w"):
        unpack_active(mask, {"w": np.ones(31, np.float32)})
    with pytest.raises(BundleError, match="type of w"):
        unpack_active(mask, {"w": np.ones(32, np.int64)})  # type: ignore[dict-item]
    for bits in (np.zeros(3, np.uint8), np.zeros(4, np.int8), np.zeros((4, 1), np.uint8)):
        with pytest.raises(BundleError, match="mask of w"):
            mask_from_bits({"w": bits}, {"w": (8, 4)})
    with pytest.raises(BundleError, match="behind"):
        mask_from_bits({"w": np.array([0b1010_0001], np.uint8)}, {"w": (7,)})
    with pytest.raises(BundleError, match="mask of v"):
        mask_from_bits({"v": np.zeros(4, np.uint8)}, {"w": (8, 4)})


@given(seeds, st.lists(st.integers(0, 9), min_size=1, max_size=4), st.floats(0, 1))
def test_quantiles_are_numpys(seed: int, sizes: list[int], q: float) -> None:
    random = np.random.default_rng(seed)
    arrays = [random.standard_normal(n).astype(np.float32) for n in sizes]
    if not sum(sizes):
        with pytest.raises(BundleError, match="nothing"):
            quantile(arrays, q)
        return
    expected = np.quantile(np.concatenate(arrays).astype(np.float64), q)
    assert quantile(arrays, q) == pytest.approx(expected, rel=1e-12, abs=1e-300)


@pytest.mark.once
def test_more_than_sixteen_million_elements_are_counted_exactly() -> None:
    """Float32 can't count them: positions and sizes must be whole numbers all the way."""
    size = 2**24 + 5
    values = np.random.default_rng(0).permutation(size).astype(np.float32) / np.float32(size)
    assert count(top_mask({"a": values[: 2**23], "b": values[2**23 :]}, 0.5)) == size // 2
    assert quantile([values], 0.75) == pytest.approx(
        float(np.partition(values, 3 * 2**22 + 3)[3 * 2**22 + 3]), abs=1e-7
    )
