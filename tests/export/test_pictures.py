"""Pictures of a cut: what they show is what was kept, and nothing in a model's names can leave the text."""

from __future__ import annotations

import re
from xml.etree import ElementTree as ET

import numpy as np
import pytest

from fedprune.architecture import Architecture, Axis, ChannelGroup, Layer, Segment, TensorKind, TensorSpec
from fedprune.selection import Selection
from fedprune_export.pictures import channel_bars, layer_widths

_SVG = "{http://www.w3.org/2000/svg}"


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
        classes=sizes[-1],
    )


def parsed(svg: str) -> ET.Element:
    return ET.fromstring(svg)  # noqa: S314  it comes from the code under test


def drawn(svg: str) -> list[tuple[float, float, str]]:
    """Per row: length of the bar, its dark part (faint cells count as much as they are dark), the text beside it."""
    rows = []
    for row in parsed(svg).findall(f"{_SVG}g"):
        bars = row.findall(f"{_SVG}rect")
        whole = float(bars[0].get("width", ""))
        dark = sum(float(b.get("width", "")) for b in bars[1:])
        for path in row.findall(f"{_SVG}path"):
            runs = re.findall(r"M[\d.]+ [\d.]+h([\d.]+)v", path.get("d", ""))
            dark += float(path.get("fill-opacity", "")) * sum(map(float, runs))
        rows.append((whole, dark, row.findall(f"{_SVG}text")[-1].text or ""))
    return rows


@pytest.mark.parametrize("sizes", [(7, 16, 64, 3, 100), (5,) * 120])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_dark_part_of_a_bar_is_the_kept_share(sizes: tuple[int, ...], seed: int) -> None:
    random = np.random.default_rng(seed)
    arch = architecture(sizes)
    widths = [int(random.integers(1, n + 1)) for n in sizes]
    selection = Selection.of(arch, widths, [random.permutation(n) for n in sizes])

    rows = drawn(channel_bars(selection))

    assert len(rows) == len(sizes)
    for (whole, dark, note), size, width in zip(rows, sizes, widths, strict=True):
        assert dark / whole == pytest.approx(width / size, abs=0.01)
        assert note == f"{width} of {size}"


def test_kept_channels_are_dark_where_they_are() -> None:
    selection = Selection.of(architecture((8,)), [3], [[6, 1, 7, 0, 2, 3, 4, 5]])

    paths = re.findall(r'd="([^"]+)"', channel_bars(selection))

    starts = [float(x) for x in re.findall(r"M([\d.]+) ", paths[0])]
    first = float(re.search(r'<rect class="cut" x="([\d.]+)"', channel_bars(selection)).group(1))  # type: ignore[union-attr]
    assert [(x - first) / 540 * 8 for x in starts] == pytest.approx([1, 6], abs=0.01)


def test_a_bar_of_many_channels_stays_small() -> None:
    arch = architecture((4096,))
    every_second = Selection.of(arch, [2048], [[*range(0, 4096, 2), *range(1, 4096, 2)]])

    svg = channel_bars(every_second)

    assert len(svg) < 5000
    ((whole, dark, _),) = drawn(svg)
    assert dark / whole == pytest.approx(0.5, abs=0.13)  # a shade is a quarter


def test_layers_are_as_long_as_they_have_channels() -> None:
    arch = architecture((10, 40, 20))

    rows = drawn(layer_widths(arch, (5, 10, 20)))

    longest = max(whole for whole, _, _ in rows)
    assert [whole / longest for whole, _, _ in rows] == pytest.approx([0.25, 1, 0.5], abs=1e-3)
    assert [dark / longest for _, dark, _ in rows] == pytest.approx([0.125, 0.25, 0.5], abs=1e-3)
    assert [note for *_, note in rows] == ["10 → 5", "40 → 10", "20"]


def test_names_are_text() -> None:
    arch = architecture((4, 4), name='</title><script>alert(1)</script>"\x00\n')

    for svg in (channel_bars(Selection.full(arch)), layer_widths(arch, (4, 4))):
        assert "<script" not in svg
        tags = {e.tag.removeprefix(_SVG) for e in parsed(svg).iter()}
        assert tags <= {"svg", "g", "title", "text", "rect", "path"}


def test_a_model_without_groups_has_an_empty_picture() -> None:
    bare = Architecture("bare", (), (), (), (), (3,), 3)

    assert drawn(channel_bars(Selection.full(bare))) == []
    assert drawn(layer_widths(bare, ())) == []
