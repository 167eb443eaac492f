"""The kinds of failure follow from errors' classes and exit codes, not from their texts."""

import numpy as np
import pytest

from fedprune.aggregation.fixed_point import check_range
from fedprune.core.errors import BundleError, ExitCode, ProtocolError, StrategyError
from fedprune.core.tensorfile import decode
from fedprune.jobs.failure_kind import FailureKind, kind_of_exit_code, kind_of_update_error


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (np.nan, FailureKind.MALFORMED),
        (np.inf, FailureKind.MALFORMED),
        (1e20, FailureKind.DIVERGED),
        (-9, FailureKind.DIVERGED),
    ],
)
def test_weights_that_are_too_large_are_of_diverged_training_and_others_malformed(
    value: float, kind: FailureKind
) -> None:
    with pytest.raises(ProtocolError) as error:
        check_range("w", np.array([value], np.float32), 8.0)
    assert kind_of_update_error(error.value) is kind


def test_a_damaged_file_is_malformed_and_a_strategy_that_fails_is_not() -> None:
    with pytest.raises(BundleError) as error:
        decode(b"short")
    assert kind_of_update_error(error.value) is FailureKind.MALFORMED
    assert kind_of_update_error(StrategyError("x")) is FailureKind.OTHER


def test_exit_codes_of_newer_boards_are_of_another_kind() -> None:
    assert {kind_of_exit_code(code) for code in set(range(256)) - set(ExitCode)} == {FailureKind.OTHER}
