import math
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedprune_device.data.reservoir import UNLABELLED, Reservoir, SampleLimits

pytestmark = pytest.mark.board


def filled_reservoir(labels: list[int], samples: int, seed: int = 0, size: int = 1, room: int = 10**9) -> Reservoir:
    """A reservoir that saw samples of these labels, whose names are their numbers."""
    reservoir = Reservoir(SampleLimits(samples, room), seed)
    for number, label in enumerate(labels):
        reservoir.apply(reservoir.decide(f"{number:06}", label, size))
    return reservoir


def chi_square(counts: list[int]) -> float:
    """Deviations from equal chances, as a standard normal number (Wilson and Hilferty, PNAS 17, 1931)."""
    expected = sum(counts) / len(counts)
    value, k = sum((c - expected) ** 2 / expected for c in counts), len(counts) - 1
    return ((value / k) ** (1 / 3) - (1 - 2 / (9 * k))) / math.sqrt(2 / (9 * k))


def test_of_one_class_every_sample_stays_with_the_same_chance() -> None:
    counts: Counter[str] = Counter()
    for seed in range(400):
        counts.update(filled_reservoir([0] * 60, 16, seed))
    kept_counts = [counts[f"{n:06}"] for n in range(60)]
    assert sum(kept_counts) == 400 * 12  # a quarter of the room is for samples without a label
    # A choice without replacement varies a little less than the test assumes.
    assert -3 < chi_square(kept_counts) < 3


def test_a_class_that_must_make_room_stays_a_uniform_choice() -> None:
    labels = [0] * 60 + [1] * 10 + [0] * 20  # the second class arrives when the first has filled the room
    counts: Counter[str] = Counter()
    for seed in range(400):
        counts.update(n for n in filled_reservoir(labels, 16, seed) if labels[int(n)] == 0)
    kept_counts = [counts[f"{n:06}"] for n, label in enumerate(labels) if label == 0]
    assert sum(kept_counts) == 400 * 6
    assert -3 < chi_square(kept_counts) < 3


@given(st.lists(st.integers(UNLABELLED, 4), max_size=150), st.integers(8, 60), st.integers(0, 3))
def test_classes_get_fair_shares_and_the_room_is_never_exceeded(labels: list[int], samples: int, seed: int) -> None:
    reservoir = filled_reservoir(labels, samples, seed)
    kept_counts = {c: len(names) for c, names in reservoir.names_by_class().items()}
    unlabelled_room, labelled_room = int(samples * 0.25), samples - int(samples * 0.25)
    arrived = Counter(labels)
    assert kept_counts.get(UNLABELLED, 0) == min(arrived[UNLABELLED], unlabelled_room)
    labelled = {c: n for c, n in kept_counts.items() if c != UNLABELLED}
    assert sum(labelled.values()) == min(len(labels) - arrived[UNLABELLED], labelled_room)
    largest = max(labelled.values(), default=0)
    for label in set(labels) - {UNLABELLED}:  # who has less than the largest has all that it ever saw, or one less
        assert labelled.get(label, 0) >= min(arrived[label], largest - 1)
    assert {c: n for c, n in reservoir.seen_counts.items() if n} == dict(arrived)


@given(st.lists(st.tuples(st.integers(UNLABELLED, 3), st.integers(1, 40)), max_size=100), st.integers(0, 3))
def test_bytes_are_bounded_whatever_the_sizes(rows: list[tuple[int, int]], seed: int) -> None:
    reservoir = Reservoir(SampleLimits(1000, 200), seed)
    for number, (label, size) in enumerate(rows):
        reservoir.apply(reservoir.decide(f"{number:06}", label, size))
        for unlabelled in (False, True):
            usage = reservoir.usage(unlabelled=unlabelled)
            assert usage["bytes"] <= usage["bytes_most"]


def test_of_samples_that_wait_for_a_label_the_newest_stay() -> None:
    reservoir = filled_reservoir([UNLABELLED] * 50 + [0] * 50, 40)
    assert list(reservoir.unlabelled_names()) == [f"{n:06}" for n in range(40, 50)]
    reservoir.apply(reservoir.decide("large", UNLABELLED, 10**8))
    assert list(reservoir.unlabelled_names())[-1] == "large"
    assert not filled_reservoir([UNLABELLED], 3).names_by_class(), "there is no room for any"


def test_samples_that_need_no_label_are_a_uniform_choice() -> None:
    counts: Counter[str] = Counter()
    for seed in range(400):
        reservoir = Reservoir(SampleLimits(48, 10**9), seed)
        reservoir.unlabelled_wait = False
        for number in range(60):
            reservoir.apply(reservoir.decide(f"{number:06}", UNLABELLED, 1))
        counts.update(reservoir)
    kept_counts = [counts[f"{n:06}"] for n in range(60)]
    assert sum(kept_counts) == 400 * 12
    assert -3 < chi_square(kept_counts) < 3


def test_what_is_too_large_for_the_room_is_declined() -> None:
    assert not Reservoir(SampleLimits(10, 100), 0).decide("a", 0, 101).is_kept
