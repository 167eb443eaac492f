"""Bars of an export's report: filled is what was kept, and a model's names stay text."""

from __future__ import annotations

import numpy as np
import pytest

from fedprune.model.architecture import Architecture, Axis, ChannelGroup, Layer, Segment, TensorKind, TensorSpec
from fedprune.model.selection import Selection
from fedprune.output.chart import LEVELS, Strip
from fedprune.output.page import Bar, bars
from fedprune_export.reports.report import channel_bars, layer_bars


def architecture(sizes: tuple[int, ...], name: str = "conv") -> Architecture:
    """Layers one after the other, each with a group of its own."""
    axes = [Axis((Segment(i, 0, n),)) for i, n in enumerate(sizes)]
    reads = [Axis.fixed(3), *axes[:-1]]
    return Architecture(
        name="drawn",
        groups=tuple(ChannelGroup(f"g{i}", n) for i, n in enumerate(sizes)),
        tensors=tuple(
            TensorSpec(f"{name}{i}.weight", TensorKind.WEIGHT, (a, r))
            for i, (a, r) in enumerate(zip(axes, reads, strict=True))
        ),
        layers=tuple(Layer(f"node{i}", "Gemm", f"{name}{i}.weight", 1) for i in range(len(sizes))),
        activations=(),
        input_shape=(3,),
        output_shape=(sizes[-1],),
    )


def only_strip(bar: Bar) -> Strip:
    (strip,) = bar.parts
    assert isinstance(strip, Strip)
    return strip


@pytest.mark.parametrize("sizes", [(7, 16, 64, 3, 100), (5,) * 120])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_filled_part_of_a_bar_is_the_kept_share(sizes: tuple[int, ...], seed: int) -> None:
    random = np.random.default_rng(seed)
    arch = architecture(sizes)
    widths = [int(random.integers(1, n + 1)) for n in sizes]
    selection = Selection.of(arch, widths, [random.permutation(n) for n in sizes])
    rows = channel_bars(selection)
    assert len(rows) == len(sizes)
    for row, size, width in zip(rows, sizes, widths, strict=True):
        assert only_strip(row).mean == pytest.approx(width / size)
        assert sum(run.width for run in only_strip(row).runs if run.level == LEVELS) == width
        assert row.note == f"{width} of {size}"


def test_a_bar_of_many_channels_stays_small() -> None:
    arch = architecture((4096,))
    every_second = Selection.of(arch, [2048], [[*range(0, 4096, 2), *range(1, 4096, 2)]])
    (row,) = channel_bars(every_second)
    assert len(bars([row], "one")) < 12_000
    assert only_strip(row).mean == pytest.approx(0.5, abs=0.02)


def test_a_model_without_groups_has_no_bars() -> None:
    bare = Architecture("bare", (), (), (), (), (3,), (3,))
    assert channel_bars(Selection.full(bare)) == []
    assert layer_bars(bare, ()) == []
