"""Sizes that vary: one name per size, and sizes at run time."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedprune.core.errors import ModelError
from fedprune.model.architecture import FIXED, Architecture, Axis, ChannelGroup, Segment
from fedprune.runtime.session import OnnxSession
from fedprune_export.autodiff.dimensions import BATCH, Dimensions
from fedprune_export.ir.graph import Graph, Port

GROUPS = {"g0": 7, "g1": 5, "g2": 11}

forms = st.dictionaries(
    st.lists(st.sampled_from([*GROUPS, BATCH]), max_size=3).map(lambda s: tuple(sorted(s))),
    st.integers(1, 6),
    max_size=4,
)


def dimensions() -> Dimensions:
    dims = Dimensions(Graph())
    for name, size in GROUPS.items():
        dims.symbol(name, size)
    return dims


@settings(max_examples=200, deadline=None)
@given(a=forms, b=forms, c=forms)
def test_equal_sizes_have_one_name(a: dict, b: dict, c: dict) -> None:
    dims = dimensions()
    x, y, z = (dims.dim(f) for f in (a, b, c))
    assert dims.total([x, y, z]) == dims.total([dims.total([z, y]), x])
    assert dims.product([x, dims.total([y, z])]) == dims.total([dims.product([x, y]), dims.product([z, x])])
    assert dims.difference(dims.total([x, y]), y) == x
    assert dims.extent(dims.product([x, y])) == dims.extent(x) * dims.extent(y)


@settings(max_examples=200, deadline=None)
@given(a=forms, b=forms.filter(bool))
def test_a_quotient_undoes_a_product(a: dict, b: dict) -> None:
    dims = dimensions()
    x, y = dims.dim(a), dims.dim(b)
    assert dims.quotient(dims.product([x, y]), y) == x


def test_what_does_not_divide_has_no_quotient() -> None:
    dims = dimensions()
    assert dims.quotient("g0", "g1") is None
    assert dims.quotient(dims.total(["g0", 1]), "g0") is None
    assert dims.quotient(dims.product(["g0", 3]), 2) is None


def test_an_axis_is_the_sum_of_its_segments() -> None:
    arch = Architecture("a", (ChannelGroup("g0", 7), ChannelGroup("one", 1)), (), (), (), (1,), (1,))
    axis = Axis((Segment(0, 0, 7, 4), Segment(FIXED, 0, 3), Segment(0, 0, 7, 2), Segment(1, 0, 1, 5)))
    assert dimensions().axis_dim(axis, arch) == "g0*6+8"  # a group of one channel never varies
    with pytest.raises(ModelError, match="uneven on an axis"):
        dimensions().axis_dim(Axis((Segment(0, 0, 3, 1),)), arch)


@settings(max_examples=60, deadline=None)
@given(form=forms, widths=st.tuples(*[st.integers(1, s) for s in GROUPS.values()]), batch=st.integers(1, 4))
def test_sizes_at_run_time(form: dict, widths: tuple[int, ...], batch: int) -> None:
    """Every symbol must be solved from a shape in which it is not alone."""
    graph = Graph()
    dims = Dimensions(graph)
    for name, size in GROUPS.items():
        dims.symbol(name, size)
    names = dict(zip(GROUPS, widths, strict=True)) | {BATCH: batch}
    shapes = {"a": ("g0*3+2", "N*g0"), "b": ("g0+g1*2", "g1*g2*4")}
    sizes = {"a": (names["g0"] * 3 + 2, batch * names["g0"])}
    sizes["b"] = (names["g0"] + names["g1"] * 2, names["g1"] * names["g2"] * 4)
    dims.dim({("g0",): 3, (): 2})
    dims.dim({("g0",): 1, ("g1",): 2})
    dims.product(["g1", "g2", 4])
    dims.product([BATCH, "g0"])
    for name, shape in shapes.items():
        graph.inputs.append(Port(name, np.dtype(np.float32), shape))
        dims.note_shape(name, shape)
    graph.emit("Identity", dims.sizes([dims.dim(form), 4, "g2"]), out="sizes")
    graph.outputs.append(Port("sizes", np.dtype(np.int64), (3,)))
    got = OnnxSession(graph.to_bytes()).run({n: np.zeros(s, np.float32) for n, s in sizes.items()})["sizes"]
    want = sum(c * int(np.prod([names[s] for s in m])) for m, c in form.items())
    assert got.tolist() == [want, 4, names["g2"]]
