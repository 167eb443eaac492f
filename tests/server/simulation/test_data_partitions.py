"""Partitions: disjoint, complete, the same every time, and with the classes, owners and sizes that were asked for."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedprune.core.errors import ConfigError, DataError
from fedprune_server.simulation.datasets import partition
from fedprune_server.simulation.datasets.data_plan import DataPlan
from fedprune_server.simulation.datasets.federation import Federation, Holding, federate
from fedprune_server.simulation.datasets.preparation import Preparation
from fedprune_server.simulation.datasets.samples import assemble_samples
from support.nets import drawn_models as strategies  # noqa: F401 - its settings of Hypothesis


def shuffled_labels(counts, seed=0):
    """Labels with so many samples per class, in random order."""
    return np.random.default_rng(seed).permutation(np.repeat(np.arange(len(counts)), counts)).astype(np.int64)


def covers(hands, rows):
    return np.array_equal(np.sort(np.concatenate(hands)), rows) and all(np.array_equal(h, np.sort(h)) for h in hands)


@st.composite
def problems(draw):
    counts = draw(st.lists(st.integers(1, 60), min_size=1, max_size=12))
    labels = shuffled_labels(counts, draw(st.integers(0, 5)))
    rows = np.flatnonzero(np.random.default_rng(1).random(len(labels)) < draw(st.sampled_from([1.0, 0.8])))
    return rows, labels, draw(st.integers(1, max(1, min(20, len(rows))))), draw(st.integers(0, 3))


@given(problems())
def test_iid(problem):
    rows, _, devices, seed = problem
    if not len(rows):
        return
    hands = partition.iid(rows, devices, seed=seed)
    sizes = [len(h) for h in hands]
    assert covers(hands, rows)
    assert min(sizes) >= 1
    assert max(sizes) - min(sizes) <= 1


@settings(max_examples=25)
@given(problems(), st.sampled_from([0.001, 0.1, 1.0, 100.0]), st.integers(0, 8))
def test_dirichlet(problem, alpha, min_samples):
    rows, labels, devices, seed = problem
    min_samples = min(min_samples, len(rows) // devices)
    if not len(rows):
        return
    hands = partition.dirichlet(rows, labels, devices, alpha=alpha, seed=seed, min_samples=min_samples)
    assert covers(hands, rows)
    assert min(map(len, hands)) >= min_samples


@given(problems(), st.integers(1, 4))
def test_pathological(problem, classes):
    rows, labels, devices, seed = problem
    if not len(rows):
        return
    present, counts = np.unique(labels[rows], return_counts=True)
    classes = min(classes, len(present))
    if devices * classes < len(present):
        with pytest.raises(DataError, match="classes per device"):
            partition.pathological(rows, labels, devices, classes=classes, seed=seed)
        return
    if counts.min() < -(-devices * classes // len(present)):
        return  # a class may be too small for its holders
    hands = partition.pathological(rows, labels, devices, classes=classes, seed=seed)
    assert covers(hands, rows)
    assert {len(np.unique(labels[h])) for h in hands} == {classes}
    holders = [sum(int(c) in labels[h] for h in hands) for c in present]
    assert max(holders) - min(holders) <= 1


@given(problems(), st.integers(1, 25))
def test_owners_stay_together(problem, devices):
    rows, owners, _, seed = problem
    present, counts = np.unique(owners[rows], return_counts=True)
    assert [set(owners[h]) for h in partition.by_owner(rows, owners, seed=seed)] == [{o} for o in present]
    if not len(rows) or devices > len(present) * counts.min() or devices > len(rows):
        return
    hands = partition.by_owner(rows, owners, devices, seed=seed)
    assert covers(hands, rows)
    assert min(map(len, hands)) >= 1
    owners_by_device = [set(owners[h]) for h in hands]
    if devices <= len(present):
        assert sum(map(len, owners_by_device)) == len(present)  # nobody is torn apart
        assert max(map(len, owners_by_device)) - min(map(len, owners_by_device)) <= 1
    else:
        assert {len(h) for h in owners_by_device} == {1}


def test_dirichlet_shares_follow_alpha():
    """A share of a class has mean 1/N and variance (N-1) / (N² (Nα+1))."""
    rows, labels = np.arange(40_000), shuffled_labels([1000] * 40)
    for alpha in (0.1, 1.0, 10.0):
        draws = [partition.dirichlet(rows, labels, 10, alpha=alpha, seed=s, min_samples=0) for s in range(5)]
        shares = np.concatenate([partition.counts_per_class(hands, labels, 40) for hands in draws])
        assert np.var(shares / 1000) == pytest.approx(9 / (100 * (10 * alpha + 1)), rel=0.15)


@given(st.integers(4, 200), st.floats(0, 0.5), st.floats(0, 0.4))
def test_splits_are_disjoint_and_complete(n, test, validation):
    rows, shares = np.arange(n) * 3, (test, validation)
    try:
        splits = partition.split_rows(rows, shares, seed=0, device="a")
    except DataError:
        # Only where rounding, by less than a sample for each of the two, may take what is left for training.
        assert n * (1 - test - validation) < 2
        return
    test_rows, validation_rows, train_rows = splits
    assert covers(splits, rows)
    assert len(train_rows)
    assert abs(len(test_rows) - test * n) <= 1
    assert (len(validation_rows) > 0) == (validation > 0)
    assert list(map(len, partition.split_rows(rows, shares, seed=0, device="b"))) == list(map(len, splits))


def test_a_split_that_leaves_no_row_for_training_is_refused():
    with pytest.raises(DataError, match="samples of a: expected more than 4"):
        partition.split_rows(np.arange(4), (0.5, 0.375), seed=0, device="a")


# --- federations


def pictures(n=400, owners=False):
    x = np.random.default_rng(0).integers(0, 256, (n, 8, 8), np.uint8)
    y = np.arange(n) % 10
    marks = np.arange(n) >= n * 3 // 4
    return assemble_samples(
        [(x[~marks], y[~marks], False), (x[marks], y[marks], True)],
        owners=[np.arange(n)[~marks] % 8, np.arange(n)[marks] % 8] if owners else None,
    )


def plan(**settings):
    return DataPlan(**{"source": "somewhere", "devices": 8, "least": 8, **settings})


def test_a_device_gets_exactly_its_rows():
    samples = pictures()
    federation = plan(validation=0.2, pool=2).deal(samples, seed=1)
    holding = federation.holdings["device-003"]
    data = federation.load("device-003")
    assert np.array_equal(data.y_train, samples.labels[holding.train])
    assert np.array_equal(data.x_test, Preparation(2)(samples.take(holding.test)))
    assert federation.count("device-003") == data.samples
    assert np.array_equal(data.y_val, samples.labels[holding.validation])


@pytest.mark.parametrize(
    ("kind", "pooled", "server", "calibration"),
    [
        ("iid", True, 0.0, 0.0),
        ("dirichlet", True, 0.1, 0.05),
        ("pathological", False, 0.1, 0.0),
        ("owners", False, 0.0, 0.05),
    ],
)
def test_nothing_is_lost_or_dealt_twice(kind, pooled, server, calibration):
    samples = pictures(owners=True)
    federation = plan(partition=kind, pooled=pooled, server=server, calibration=calibration).deal(samples)
    hands = (holding.rows for holding in federation.holdings.values())
    dealt_rows = np.concatenate([*hands, federation.server, federation.calibration])
    calibration_inputs = federation.calibration_inputs()
    assert (0 if calibration_inputs is None else len(calibration_inputs)) == calibration * (400 if pooled else 300)
    assert np.array_equal(np.sort(dealt_rows), np.arange(400))
    if not pooled:
        assert set(np.flatnonzero(samples.is_test)) <= set(federation.server)
    assert len(federation.server) == (0 if pooled else 100) + server * (400 if pooled else 300)


def test_a_fingerprint_changes_with_rows_samples_and_preparation():
    samples = pictures()
    federation = plan().deal(samples)
    changed = replace(samples, arrays=tuple(array.copy() for array in samples.arrays))
    changed.arrays[0][0] ^= 1
    fingerprints = {
        federation.fingerprint("device-000"),
        federation.fingerprint("device-001"),
        plan().deal(samples, seed=1).fingerprint("device-000"),
        plan(pool=2).deal(samples).fingerprint("device-000"),
        replace(federation, samples=changed).fingerprint("device-000"),
    }
    assert len(fingerprints) == 5
    assert plan().deal(pictures()).fingerprint("device-000") in fingerprints


def test_standardising_does_not_look_at_the_servers_samples():
    samples = pictures()
    federation = plan(standardise=True, pooled=False).deal(samples)
    samples.arrays[1][:] = 0
    assert plan(standardise=True, pooled=False).deal(samples).preparation == federation.preparation


def test_a_row_that_two_hold_is_refused():
    rows = np.arange(4)
    with pytest.raises(DataError, match="row 3"):
        Federation(pictures(), {"a": Holding(rows, rows[:0], rows[:0]), "b": Holding(rows[3:], rows[:0], rows[:0])})
    with pytest.raises(DataError, match="samples of a:"):
        Federation(pictures(), {"a": Holding(rows[:0], rows, rows[:0])})
    with pytest.raises(DataError, match="names"):
        federate(pictures(), [rows], seed=0, names=["a", "b"])


# --- the table [data]


def test_the_table_is_read(tmp_path):
    samples = pictures()
    np.savez(tmp_path / "a.npz", x_train=samples.arrays[0], y_train=samples.labels[:300])
    body = {"source": "a.npz", "devices": 5, "partition": "pathological", "classes": 3, "test": 0.2}
    federation = DataPlan.from_dict(body, tmp_path).read(seed=3)
    assert len(federation.names) == 5
    assert {int((row > 0).sum()) for row in federation.counts()} == {3}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sauce": 1}, "sauce: unknown key"),
        ({"source": ""}, "source"),
        ({"partition": "fair"}, "partition: expected iid or dirichlet"),
        ({"size": [8]}, "size"),
    ],
)
def test_a_wrong_setting_is_named(change, message):
    with pytest.raises(ConfigError, match=rf"^data.*{message}"):
        DataPlan.from_dict({"source": "a", "devices": 4, **change})


def test_too_few_samples_come_with_how_many_are_needed():
    with pytest.raises(DataError, match=r"at least 64 \(8 each\)"):
        plan(devices=8, most=5).deal(pictures())
    with pytest.raises(DataError, match="at least 8,"):
        plan(devices=8, most=5, partition="iid").deal(pictures())
