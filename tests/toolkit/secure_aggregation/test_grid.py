"""A cohort's sum is the plain fold's, bit for bit; codes of 32 bits never overflow."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedprune.aggregation.fixed_point import MAX_WEIGHT, FixedSum, Range
from fedprune.aggregation.fold import Fold
from fedprune.core.errors import ProtocolError
from fedprune.model.architecture import Architecture
from fedprune.model.selection import Selection, Tensors
from fedprune.secure_aggregation.grid import CohortGrid, step_exponent
from fedprune.secure_aggregation.masks import Vector
from fedprune.secure_aggregation.session import SecureSumSession
from fedprune.secure_aggregation.vector_form import MAX_CODE, MaskedForm, TensorGrid, VectorForm
from support.fakes.masked_cohort import NAMES, MaskedCohort, plain_sum
from support.fakes.strategy_rounds import NET, TRAINED
from support.nets.drawn_models import architectures, model, perturb_submodel, seeds, selections

pytestmark = pytest.mark.board


def exact(fold: Fold, selection: Selection, boards: int) -> CohortGrid:
    return CohortGrid(selection, {t.name: TensorGrid(fold.sum_range(t.name)) for t in fold.shared}, boards)


def total(grid: CohortGrid, vectors: list[Vector]) -> Vector:
    return plain_sum(vectors, SecureSumSession(b"x", 2, 2, grid.narrow, grid.wide))


def alike(plain: Fold, masked: Fold) -> None:
    assert (plain.weight, plain.updates) == (masked.weight, masked.updates)
    for first, second in zip(plain.close(0.5), masked.close(0.5), strict=True):
        assert first is not None
        assert second is not None
        assert {n: v.tobytes() for n, v in first.items()} == {n: v.tobytes() for n, v in second.items()}


@st.composite
def cohorts(draw: st.DrawFn) -> tuple[Architecture, Tensors, list[tuple[Selection, list[Tensors]]]]:
    """A round of up to three cohorts, each of one selection."""
    architecture = draw(architectures())
    base, out = model(architecture, draw(seeds)), []
    for _ in range(draw(st.integers(1, 3))):
        selection = draw(selections(architecture))
        out.append(
            (selection, [perturb_submodel(selection, base, draw(seeds)) for _ in range(draw(st.integers(1, 4)))])
        )
    return architecture, base, out


@given(cohorts())
@settings(deadline=None, max_examples=40)
def test_cohorts_give_the_bits_of_a_plain_fold(
    case: tuple[Architecture, Tensors, list[tuple[Selection, list[Tensors]]]],
) -> None:
    architecture, base, several = case
    plain, masked = Fold(architecture, base), Fold(architecture, base)
    for selection, updates in several:
        grid, sent = exact(masked, selection, 4), selection.gather(base)
        vectors = [grid.form.encode(tensors, sent)[0] for tensors in updates]
        masked.add_partial_sums([grid.partial_sums(total(grid, vectors), len(updates), sent)])
        for tensors in updates:
            plain.add(selection, tensors, 1)
    alike(plain, masked)


def test_boards_that_mask_give_the_bits_of_a_plain_fold() -> None:
    base = model(NET, 1)
    selection = Selection.of(NET, (4, 3), ([5, 0, 3, 1, 2, 4], [1, 0, 3, 2]))
    plain, masked = Fold(NET, base, excluded=["head.weight"]), Fold(NET, base, excluded=["head.weight"])
    grid, sent = exact(masked, selection, 8), selection.gather(base)
    cohort, names = MaskedCohort(SecureSumSession(b"grid", 8, 5, grid.narrow, grid.wide), NAMES[:8]), NAMES[:8]
    updates = {name: perturb_submodel(selection, base, i) for i, name in enumerate(names)}
    vectors = {name: grid.form.encode(tensors, sent)[0] for name, tensors in updates.items()}
    board_sum = cohort.carry_out(vectors, {"mask": {names[1]}, "unmask": {names[4]}})
    masked.add_partial_sums([grid.partial_sums(board_sum, len(cohort.collector.boards), sent)])
    for name in cohort.collector.boards:
        plain.add(selection, updates[name], 1)
    assert plain.updates == 7
    alike(plain, masked)


def coded_grid(base: Tensors, steps: dict[str, int], boards: int) -> tuple[Fold, CohortGrid]:
    fold = Fold(NET, base)
    tensors = {t.name: TensorGrid(fold.sum_range(t.name), steps.get(t.name)) for t in fold.shared}
    return fold, CohortGrid(Selection.full(NET), tensors, boards)


@given(seeds, st.integers(1, 5), st.integers(-20, -5))
@settings(deadline=None, max_examples=40)
def test_codes_give_the_bits_of_a_plain_fold_of_coded_differences(seed: int, boards: int, step: int) -> None:
    base = model(NET, seed)
    masked, grid = coded_grid(base, dict.fromkeys(TRAINED, step), boards)
    assert grid.narrow == sum(base[n].size for n in TRAINED)
    plain = {n: FixedSum(base[n].shape, masked.sum_range(n)) for n in TRAINED}
    vectors = []
    for i in range(boards):
        new = perturb_submodel(Selection.full(NET), base, seed + i, scale=2.0**step * 40)
        vector, left = grid.form.encode(new, base)
        vectors.append(vector)
        for name in TRAINED:
            difference = new[name].astype(np.float64) - base[name]
            codes = np.clip(np.rint(difference / 2.0**step), -MAX_CODE, MAX_CODE)
            assert np.allclose(left[name], difference - codes * 2.0**step, atol=1e-7 * 2.0**step)
            plain[name].add(base[name].astype(np.float64) + codes * 2.0**step, 1)
    sums = grid.partial_sums(total(grid, vectors), boards, base)
    for name in TRAINED:
        assert sums.arrays["value", name, 0].tobytes() == plain[name].limbs[0].tobytes()
    masked.add_partial_sums([sums])
    assert masked.weight == boards


def test_what_codes_leave_out_is_made_up_for_later() -> None:
    base = model(NET, 5)
    _, grid = coded_grid(base, dict.fromkeys(TRAINED, -6), 1)
    new = perturb_submodel(Selection.full(NET), base, 6, scale=0.004)  # half a step is 0.008
    reached, left = {n: np.zeros(base[n].shape) for n in TRAINED}, None
    for _ in range(50):
        vector, left = grid.form.encode(new, base, left)
        start = 0
        for name in (t.name for t in NET.tensors if t.name in TRAINED):
            codes = vector.narrow.view(np.int32)[start : start + base[name].size].reshape(base[name].shape)
            start += base[name].size
            reached[name] += codes * 2.0**-6
    for name in TRAINED:
        assert np.allclose(reached[name] / 50, new[name] - base[name], atol=2.0**-6 / 50)


def test_the_largest_codes_of_the_most_boards_fit() -> None:
    """127·2^24 fits into 32 bits; so do 2^24 times the largest values into 64."""
    base = {n: np.zeros(v.shape, np.float32) for n, v in model(NET, 1).items()}
    far = {n: np.full(v.shape, 8.0 if n in TRAINED else 2.0**24, np.float32) for n, v in base.items()}
    for sign, steps in ((1, {}), (-1, {}), (1, dict.fromkeys(TRAINED, -5)), (-1, dict.fromkeys(TRAINED, -5))):
        fold, grid = coded_grid(base, steps, MAX_WEIGHT)
        vector, _ = grid.form.encode(
            {n: v if n == "norm.variance" else np.float32(sign) * v for n, v in far.items()}, base
        )
        boards = Vector(vector.narrow * np.uint32(MAX_WEIGHT), vector.wide * np.uint64(MAX_WEIGHT))
        sums = grid.partial_sums(boards, MAX_WEIGHT, base)
        assert sums.weight == MAX_WEIGHT
        for name in TRAINED:
            units = round((MAX_CODE * 2.0**-5 if steps else 8.0) / fold.sum_range(name).unit)
            assert np.array_equal(sums.arrays["value", name, 0], np.full(base[name].shape, sign * MAX_WEIGHT * units))


def test_updates_that_do_not_fit_are_refused_before_they_are_masked() -> None:
    base = model(NET, 1)
    _, grid = coded_grid(base, dict.fromkeys(TRAINED, -8), 2)
    for wrong, problem in (
        ({**base, "first.weight": base["first.weight"] * np.float32(np.nan)}, "not finite"),
        ({**base, "first.weight": np.full_like(base["first.weight"], 1e9)}, "values of first.weight"),
        ({**base, "first.weight": base["first.weight"].astype(np.float64)}, "type of first.weight"),
        ({**base, "first.weight": base["first.weight"][:1]}, "shape of first.weight"),
        ({n: v for n, v in base.items() if n != "first.weight"}, "lacks tensor first.weight"),
    ):
        with pytest.raises(ProtocolError, match=problem):
            grid.form.encode(wrong, base)


def test_a_form_that_was_sent_to_a_board_gives_the_same_vector() -> None:
    base = model(NET, 1)
    _, grid = coded_grid(base, {"first.weight": -8}, 2)
    new = perturb_submodel(Selection.full(NET), base, 6, scale=0.1)
    received_form = VectorForm.from_json(json.loads(json.dumps(grid.form.to_json())))
    assert received_form.encode(new, base)[0].to_bytes() == grid.form.encode(new, base)[0].to_bytes()
    for wrong in (
        [],
        [["first.weight", 3, 1]],
        [["first.weight", 3, 1, None]] * 2,
        [[1, 3, 1, None]],
        [["first.weight", 3, 9, None]],
        "first.weight",
        [["first.weight", 3, 1, 9]],
    ):
        with pytest.raises(ProtocolError):
            VectorForm.from_json(wrong)
    form = MaskedForm(grid.form, grid.narrow, grid.wide)
    assert MaskedForm.from_json(json.loads(json.dumps(form.to_json()))) == form
    for body in (
        None,
        [],
        {},
        {**form.to_json(), "wide": -1},
        *({**form.to_json(), "weight": weight} for weight in (0, 2, 2**20, "3")),
    ):
        with pytest.raises(ProtocolError):
            MaskedForm.from_json(body)


def test_tensors_that_stay_on_boards_enter_the_sum_as_they_were_sent() -> None:
    base = model(NET, 1)
    masked, plain = Fold(NET, base), Fold(NET, base)
    selection, stays = Selection.of(NET, (4, 3), ([5, 0, 3, 1, 2, 4], [1, 0, 3, 2])), {"head.weight", "norm.mean"}
    travels = {t.name: TensorGrid(masked.sum_range(t.name)) for t in masked.shared if t.name not in stays}
    grid = CohortGrid(selection, travels, 2, {name: masked.sum_range(name) for name in stays})
    sent = selection.gather(base)
    updates = [{**perturb_submodel(selection, base, i), **{n: sent[n] for n in stays}} for i in range(2)]
    vectors = [grid.form.encode(update, sent)[0] for update in updates]
    assert not stays & set(grid.form.tensors)
    masked.add_partial_sums([grid.partial_sums(total(grid, vectors), 2, sent)])
    for update in updates:
        plain.add(selection, update, 1)
    alike(plain, masked)


def test_sums_that_can_be_no_cohort_s_are_refused() -> None:
    base = model(NET, 1)
    _, grid = coded_grid(base, {"first.weight": -8}, 2)
    good = total(grid, [grid.form.encode(base, base)[0]] * 2)
    assert grid.partial_sums(good, 2, base).weight == 2
    heavy, coarse, wide = good.copy(), good.copy(), good.copy()
    heavy.wide[0] = 3
    coarse.narrow[0] = 2 * MAX_CODE + 1
    wide.wide[7] = np.uint64(2**63)
    for wrong, boards, problem in (
        (heavy, 2, "updates in the sum of a cohort"),
        (coarse, 2, "sums of first.weight: .*No single update can be blamed"),
        (wide, 2, "sums of norm.mean"),
        (good, 3, "sum of a cohort"),
        (Vector(good.narrow[1:], good.wide), 2, "sum of a cohort"),
    ):
        with pytest.raises(ProtocolError, match=problem):
            grid.partial_sums(wrong, boards, base)


def test_grids_that_could_overflow_or_round_are_refused() -> None:
    span = Range(3)
    for step in (3 - 38, 3 - 7):
        with pytest.raises(ProtocolError, match="from -34 to -5"):
            TensorGrid(span, step)
    with pytest.raises(ProtocolError, match="several limbs"):
        TensorGrid(Range(24, 2), 0)
    selection = Selection.full(NET)
    with pytest.raises(ProtocolError, match="none for statistics"):
        CohortGrid(selection, {"norm.mean": TensorGrid(span, -8)}, 2)
    with pytest.raises(ProtocolError, match="got x"):
        CohortGrid(selection, {"x": TensorGrid(span)}, 2)
    with pytest.raises(ProtocolError, match="boards of a cohort"):
        CohortGrid(selection, {"first.weight": TensorGrid(span)}, MAX_WEIGHT + 1)


@given(st.floats(1e-9, 1e3))
def test_a_step_reaches_the_largest_difference_and_no_further_than_needed(largest: float) -> None:
    step = step_exponent(largest)
    assert MAX_CODE * 2.0**step >= largest > MAX_CODE * 2.0 ** (step - 1)
