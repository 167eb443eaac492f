"""Partial sums survive their way as bytes, and damaged ones are refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedprune.aggregation import sums_file
from fedprune.aggregation.fold import Fold
from fedprune.core import tensorfile
from fedprune.core.errors import BundleError
from fedprune.model.architecture import Architecture, Axis, ChannelGroup, Segment, TensorKind, TensorSpec
from fedprune.model.selection import Selection, Tensors
from support.nets.drawn_models import architectures, model, ranks, seeds, trained, widths

Update = tuple[Selection, Tensors, int, int]


@st.composite
def rounds(draw: st.DrawFn) -> tuple[Architecture, Tensors, list[Update]]:
    architecture = draw(architectures())
    base, out = model(architecture, draw(seeds)), []
    for _ in range(draw(st.integers(2, 6))):
        order = draw(st.none() | ranks(architecture))
        selection = Selection.of(architecture, draw(widths(architecture)), order)
        out.append((selection, trained(selection, base, draw(seeds)), draw(st.integers(1, 1000)), 5))
    return architecture, base, out


@given(rounds(), st.lists(st.integers(0, 3), min_size=6, max_size=6), st.booleans())
@settings(max_examples=40)
def test_regions_of_a_tree_give_the_bits_of_one_server(
    case: tuple[Architecture, Tensors, list[Update]], places: list[int], evidence: bool
) -> None:
    """Updates are added up in up to four places, each sum travels as bytes, and one of the places has another below."""
    architecture, base, updates = case
    whole = Fold(architecture, base, evidence=evidence)
    folds = [Fold(architecture, base, evidence=evidence) for _ in range(4)]
    for update, place in zip(updates, places, strict=False):
        whole.add(*update)
        folds[place].add(*update)
    for below, above in ((3, 2), (2, 0), (1, 0)):
        if folds[below].updates:
            folds[above].take([sums_file.decode(sums_file.encode(folds[below].partial()), architecture)])
    assert (folds[0].weight, folds[0].updates) == (whole.weight, whole.updates)
    for mine, theirs in zip(whole.close(0.5), folds[0].close(0.5), strict=True):
        assert mine is not None
        assert theirs is not None
        assert {n: v.tobytes() for n, v in mine.items()} == {n: v.tobytes() for n, v in theirs.items()}


@pytest.fixture(scope="module")
def encoded() -> tuple[Architecture, bytes]:
    architecture = _architecture()
    base = model(architecture, 1)
    fold = Fold(architecture, base)
    fold.add(Selection.full(architecture), trained(Selection.full(architecture), base, 2), 3, 5)
    return architecture, sums_file.encode(fold.partial())


def _architecture() -> Architecture:
    spec = TensorSpec("w", TensorKind.WEIGHT, (Axis((Segment(0, 0, 4),)),))
    return Architecture("net", (ChannelGroup("c", 4),), (spec,), (), (), (3,), (2,))


def changed(raw: bytes, **about: object) -> bytes:
    tensors = tensorfile.decode(raw)
    text = json.dumps(json.loads(tensors["about"].tobytes()) | about).encode()
    return tensorfile.encode({**tensors, "about": np.frombuffer(text, np.uint8)})


@pytest.mark.parametrize(
    "about",
    [
        {"format": "fedprune.sums/2"},
        {"updates": 0},
        {"updates": True},
        {"shares": [["{}", 1]]},
        {"layout": "{}"},
        {"names": 3},
    ],
    ids=str,
)
def test_what_is_wrong_is_refused(encoded: tuple[Architecture, bytes], about: dict[str, object]) -> None:
    architecture, raw = encoded
    sums_file.decode(changed(raw), architecture)
    with pytest.raises(BundleError):
        sums_file.decode(changed(raw, **about), architecture)


def test_bytes_that_are_none_are_refused(encoded: tuple[Architecture, bytes]) -> None:
    architecture, raw = encoded
    for damaged in (b"", raw[: len(raw) // 2], tensorfile.encode({"a": np.zeros(3, np.int64)})):
        with pytest.raises(BundleError):
            sums_file.decode(damaged, architecture)
