import math
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedprune_device.data.reservoir import UNLABELLED, Reservoir, SampleLimits

pytestmark = pytest.mark.board


def filled_reservoir(labels: list[int], samples: int, seed: int = 0, *, unlabelled_wait: bool = True) -> Reservoir:
    """A reservoir that saw samples of these labels, whose names are their numbers."""
    reservoir = Reservoir(SampleLimits(samples, 10**9), seed)
    reservoir.unlabelled_wait = unlabelled_wait
    for number, label in enumerate(labels):
        reservoir.apply(reservoir.decide(f"{number:06}", label, 1))
    return reservoir


def chi_square(counts: list[int]) -> float:
    """Deviations from equal chances, as a standard normal number (Wilson and Hilferty, PNAS 17, 1931)."""
    expected = sum(counts) / len(counts)
    value, k = sum((c - expected) ** 2 / expected for c in counts), len(counts) - 1
    return ((value / k) ** (1 / 3) - (1 - 2 / (9 * k))) / math.sqrt(2 / (9 * k))


@pytest.mark.parametrize(
    ("labels", "samples", "kept"),
    [
        ([0] * 60, 16, 12),  # a quarter of the room is for samples without a label
        ([0] * 60 + [1] * 10 + [0] * 20, 16, 6),  # the second class arrives when the first has filled the room
        ([UNLABELLED] * 60, 48, 12),
    ],
    ids=["one class", "a class that must make room", "no labels needed"],
)
def test_of_each_class_every_sample_stays_with_the_same_chance(labels: list[int], samples: int, kept: int) -> None:
    counts: Counter[str] = Counter()
    for seed in range(400):
        counts.update(filled_reservoir(labels, samples, seed, unlabelled_wait=labels[0] != UNLABELLED))
    kept_counts = [counts[f"{n:06}"] for n, label in enumerate(labels) if label == labels[0]]
    assert sum(kept_counts) == 400 * kept
    # A choice without replacement varies a little less than the test assumes.
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


@given(st.lists(st.tuples(st.integers(UNLABELLED, 3), st.integers(1, 250)), max_size=100), st.integers(0, 3))
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
