"""Latency tables: work counted as by hand, a fit that finds the board behind the times, checks of what comes in."""

import itertools
import json
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedprune.core.errors import ProfileError
from fedprune.model.architecture import (
    Architecture,
    Axis,
    ChannelGroup,
    LayerRow,
    Segment,
    TensorKind,
    TensorSpec,
    Volume,
    widths_at,
)
from fedprune.planning.costs import costs_at, memory_seconds
from fedprune.planning.kernel_kinds import FEATURES, KINDS
from fedprune.planning.kernel_workload import workload
from fedprune.planning.latency_model import LatencyTable, Measurement, fit_latency_table, typical_table
from fedprune.planning.plan_search import DENSITIES
from fedprune.planning.width_candidates import width_candidates

pytestmark = pytest.mark.board

BRIEF = settings(max_examples=30, deadline=None)


def net(first: int = 32, second: int = 64, side: int = 16) -> Architecture:
    """Two convolutions, the second depthwise beside a 1×1, a product of values, a linear layer."""
    a, b = Axis((Segment(0, 0, first),)), Axis((Segment(1, 0, second),))
    maps = side * side
    three = Axis.fixed(3)
    return Architecture(
        "net",
        (ChannelGroup("a", first), ChannelGroup("b", second)),
        (
            TensorSpec("conv", TensorKind.WEIGHT, (a, three, three, three)),
            TensorSpec("dw", TensorKind.WEIGHT, (a, Axis.fixed(1), three, three)),
            TensorSpec("pw", TensorKind.WEIGHT, (b, a, Axis.fixed(1), Axis.fixed(1))),
            TensorSpec("fc", TensorKind.WEIGHT, (Axis.fixed(10), b)),
        ),
        (
            LayerRow("conv", "Conv", "conv", maps, 0, Volume((), 3 * maps), Volume((a,), maps), 9),
            LayerRow("relu", "Relu", "", 0, 0, Volume((a,), maps), Volume((a,), maps)),
            LayerRow("dw", "Conv", "dw", maps, 0, Volume((a,), maps), Volume((a,), maps), 9, 1, first),
            LayerRow("pw", "Conv", "pw", maps, 0, Volume((a,), maps), Volume((b,), maps)),
            LayerRow("att", "MatMul", "", 0, 0, Volume((b,), maps), Volume((b,), b.length), inner=Axis.fixed(maps)),
            LayerRow("mean", "GlobalAveragePool", "", 0, 0, Volume((b,), maps), Volume((b,), 1)),
            LayerRow("fc", "Gemm", "fc", 1, 0, Volume((b,), 1), Volume((), 10)),
        ),
        (),
        (3, side, side),
        (10,),
    )


NET = net()


def feature_of(row: np.ndarray, kind: str, feature: str) -> float:
    return float(row.reshape(len(KINDS), len(FEATURES))[KINDS.index(kind), FEATURES.index(feature)])


def test_the_work_of_a_step_by_hand() -> None:
    row = workload(NET).training([8, 20], 4)[0]
    assert feature_of(row, "conv", "mac") == pytest.approx(4 * 8 * 27 * 256 * 2 / 3)  # no gradient of the input
    assert feature_of(row, "conv", "weight") == 8 * 27
    assert feature_of(row, "depthwise", "mac") == 4 * 8 * 9 * 256
    assert feature_of(row, "conv1x1", "mac") == 4 * 8 * 20 * 256
    assert feature_of(row, "product", "mac") == 4 * 20 * 64 * 256
    assert feature_of(row, "linear", "move") == 4 * (20 + 10)
    assert feature_of(row, "cheap", "move") == 4 * 2 * 8 * 256
    assert [feature_of(row, k, "call") for k in ("conv", "depthwise", "conv1x1", "linear", "run")] == [1] * 5


def test_an_activation_after_a_convolution_is_no_kernel_of_its_own() -> None:
    assert feature_of(workload(NET).inference([NET.sizes], 1, 16)[0], "cheap", "call") == 0
    assert feature_of(workload(NET).training([NET.sizes], 1)[0], "cheap", "call") == 1


@given(st.tuples(st.integers(1, 32), st.integers(1, 64)))
@BRIEF
def test_multiplications_are_those_of_the_costs(widths: tuple[int, int]) -> None:
    assert workload(NET).forward_macs(widths)[0] == costs_at(NET, widths).forward_macs


@given(st.lists(st.tuples(st.integers(1, 32), st.integers(1, 64)), min_size=1, max_size=5))
@BRIEF
def test_many_widths_at_once_are_the_same_as_one_by_one(widths: list[tuple[int, int]]) -> None:
    table = typical_table(1e10)
    steps, latencies = table.step_seconds(NET, widths, 8), table.latency_seconds(NET, widths)
    assert steps == pytest.approx([float(table.step_seconds(NET, w, 8)[0]) for w in widths])
    assert latencies == pytest.approx([float(table.latency_seconds(NET, w)[0]) for w in widths])


def made_up(block: int = 16) -> LatencyTable:
    random = np.random.default_rng(3)
    typical = typical_table(2e10)

    def rows(measured_rows: Any) -> dict[str, tuple[float, ...]]:
        return {k: tuple(v * float(random.uniform(0.5, 2)) for v in row) for k, row in measured_rows.items()}

    return LatencyTable(block, rows(typical.training), rows(typical.inference))


def measurements(table: LatencyTable, nets: list[Architecture], count: int = 30) -> list[Measurement]:
    random = np.random.default_rng(5)
    out = []
    for architecture in nets:
        for _ in range(count):
            widths = tuple(int(random.integers(1, n + 1)) for n in architecture.sizes)
            batch = int(random.integers(1, 17))
            step = float(table.step_seconds(architecture, widths, batch)[0])
            out += [
                Measurement(architecture, widths, batch, step, True),
                Measurement(architecture, widths, 1, float(table.latency_seconds(architecture, widths)[0]), False),
            ]
    return out


def test_a_fit_foretells_a_net_that_it_has_not_seen() -> None:
    board = made_up()
    fit = fit_latency_table(measurements(board, [net(32, 64, 16), net(64, 160, 8), net(48, 96, 4)]))
    unseen_net = net(40, 120, 12)
    widths = [(7, 40), (40, 120), (24, 96), (13, 119)]
    assert fit.error < 0.02
    assert fit.points == 180
    assert fit.step_seconds(unseen_net, widths, 8) == pytest.approx(board.step_seconds(unseen_net, widths, 8), rel=0.15)
    assert fit.latency_seconds(unseen_net, widths) == pytest.approx(board.latency_seconds(unseen_net, widths), rel=0.15)


def test_a_fit_finds_the_block() -> None:
    assert fit_latency_table(measurements(made_up(8), [net(32, 64, 16), net(64, 160, 8)])).block == 8


def test_kinds_that_were_not_seen_are_typical_for_the_board() -> None:
    typical = typical_table(5e10)
    slow = fit_latency_table([replace(m, seconds=10 * m.seconds) for m in measurements(typical, [NET])], typical)
    assert slow.training["recurrent"] == pytest.approx(typical_table(5e9).training["recurrent"], rel=0.05)


def test_a_table_survives_json() -> None:
    table = fit_latency_table(measurements(made_up(), [NET], 5))
    assert LatencyTable.from_dict(json.loads(table.to_json())) == table


@pytest.mark.parametrize(
    "change",
    [
        {"block": 3},
        {"training": []},
        {"inference": {"conv": [1, 2, 3, 4, math.inf]}},
        {"error": math.nan},
        {"training": {k: [0, 0, 1, 1, 1] for k in KINDS}},
    ],
)
def test_a_table_from_outside_is_checked(change: dict[str, Any]) -> None:
    with pytest.raises(ProfileError, match="latency table"):
        LatencyTable.from_dict({**made_up().to_dict(), **change})


@pytest.mark.parametrize("seed", range(8))
def test_rungs_lie_on_one_another_and_are_not_slower_than_uniform_width(seed: int) -> None:
    random = np.random.default_rng(seed)
    architecture = net(*(int(n) for n in random.integers(3, 200, 2)))
    table = made_up(int(random.choice([1, 8, 16])))
    # In half of all cases main memory bounds the steps of wide models or of all.
    full_step_s = table.step_seconds(architecture, architecture.sizes, 16)[0]
    bandwidth = (
        math.inf if seed < 4 else float(memory_seconds(architecture, architecture.sizes, 16, full_step_s)[0] / 1.2)
    )

    def times(widths: tuple[int, ...]) -> tuple[float, float]:
        step = table.step_seconds(architecture, widths, 16)[0]
        floor = memory_seconds(architecture, widths, 16, bandwidth)[0]
        return max(step, floor), table.latency_seconds(architecture, widths)[0]

    uniform = [widths_at(architecture, k / 256) for k in range(1, 257)]
    macs = workload(architecture).forward_macs(uniform)
    ladder = width_candidates(architecture, table, 16, DENSITIES, bandwidth)
    assert ladder[0].widths == architecture.sizes
    for above, below in itertools.pairwise(ladder):
        assert all(a >= b >= 1 for a, b in zip(above.widths, below.widths, strict=True))
        assert above.widths != below.widths
    for candidate in ladder[:-1]:
        equal_work = uniform[int(np.argmax(macs >= workload(architecture).forward_macs(candidate.widths)[0]))]
        for mine, its in zip(times(candidate.widths), times(equal_work), strict=True):
            assert mine <= its * (1 + 1e-9)
    # What the smallest board can hold is no question of speed.
    assert ladder[-1].widths == tuple(map(min, widths_at(architecture, DENSITIES[-1]), ladder[-2].widths))


def test_a_cliff_is_kept_to_the_cheap_side_of() -> None:
    typical = typical_table(5e10)
    dear = {k: tuple(9 * v for v in row) if k.endswith("plain") else row for k, row in typical.inference.items()}
    ladder = width_candidates(NET, LatencyTable(16, typical.training, dear), 16, DENSITIES)
    # The first group's channels are read by a convolution; the second's only by a linear layer.
    assert all(candidate.widths[0] % 4 == 0 for candidate in ladder[:-1])
    assert len(ladder) > 8
