"""When a model at lower precision may serve."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedprune.runtime.agreement import MAX_ACCURACY_LOSS, MAX_RELATIVE_ERROR, MIN_SAME_SHARE, compare_outputs

pytestmark = pytest.mark.board


def classes(decided: list[int], of: int = 4) -> np.ndarray:
    return np.eye(of, dtype=np.float32)[decided] * 5


@given(st.integers(1, 400), st.data())
def test_the_share_of_other_decisions_decides(n: int, data: st.DataObject) -> None:
    changed_count = data.draw(st.integers(0, n))
    reference = classes([0] * n)

    verdict = compare_outputs("cross_entropy", reference, classes([1] * changed_count + [0] * (n - changed_count)))

    assert verdict.same == pytest.approx(1 - changed_count / n)
    assert (verdict.refusal == "") == (changed_count <= max(1, (1 - MIN_SAME_SHARE) * n + 1e-6))


@given(st.integers(100, 1000), st.integers(0, 30))
def test_lost_answers_decide(n: int, lost: int) -> None:
    y = np.zeros(n, np.int64)

    verdict = compare_outputs("cross_entropy", classes([0] * n), classes([1] * lost + [0] * (n - lost)), y)

    assert verdict.right == pytest.approx((1.0, 1 - lost / n))
    assert (verdict.refusal == "") == (lost <= max(1, MAX_ACCURACY_LOSS * n + 1e-6))


@pytest.mark.parametrize("loss", ["mse", "huber"])
@pytest.mark.parametrize("share", [0.0, 0.9, 1.1])
def test_numbers_may_be_off_by_a_share_of_their_spread(loss: str, share: float) -> None:
    reference = np.array([[-1.0], [1.0]] * 10) + 40

    verdict = compare_outputs(loss, reference, reference + share * MAX_RELATIVE_ERROR, None)

    assert verdict.error == pytest.approx(share * MAX_RELATIVE_ERROR)
    assert (verdict.refusal == "") == (share < 1)
    assert verdict.same is None


@pytest.mark.parametrize("n", [1, 20])
@pytest.mark.parametrize("share", [0.9, 1.1])
def test_numbers_that_do_not_spread_are_compared_with_their_size(n: int, share: float) -> None:
    reference = np.full((n, 1), -40.0)

    verdict = compare_outputs("mse", reference, reference + share * MAX_RELATIVE_ERROR * 40 / 100)

    assert verdict.error == pytest.approx(share * MAX_RELATIVE_ERROR)
    assert (verdict.refusal == "") == (share < 1)


@pytest.mark.parametrize("loss", ["cross_entropy", "bce", "mse"])
def test_what_is_not_finite_never_serves(loss: str) -> None:
    outputs = classes([0, 1])
    outputs[0, 3] = np.nan

    assert "not finite" in compare_outputs(loss, classes([0, 1]), outputs).refusal


@pytest.mark.parametrize("labels", [False, True])
@pytest.mark.parametrize("loss", ["cross_entropy", "bce", "mse"])
def test_what_was_compared_on_nothing_never_serves(loss: str, labels: bool) -> None:
    none = np.zeros((0, 4), np.float32)
    y = np.zeros(0, np.int64) if loss == "cross_entropy" else none

    verdict = compare_outputs(loss, none, none, y if labels else None)

    assert "no samples" in verdict.refusal
    assert verdict.samples == 0
