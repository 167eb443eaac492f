"""Hypothesis strategies for what the toolkit computes on: architectures, selections, models."""

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st

from fedprune.model.architecture import (
    FIXED,
    Activation,
    Architecture,
    Axis,
    ChannelGroup,
    LayerRow,
    Segment,
    TensorKind,
    TensorSpec,
)
from fedprune.model.selection import Selection, Tensors

Update = tuple[Selection, Tensors, int, int]  # a selection, its trained tensors, its weight, and steps

settings.register_profile("shared-machine", deadline=None, max_examples=50)
settings.load_profile("shared-machine")  # a test's time says more about its neighbours than about the code

_VECTORS = (TensorKind.BIAS, TensorKind.NORM_SCALE, TensorKind.NORM_BIAS, TensorKind.STAT_MEAN, TensorKind.STAT_VAR)


@st.composite
def architectures(draw: st.DrawFn) -> Architecture:
    """Nets with concats, splits, flattened maps, shortcuts, depthwise and transposed weights."""
    sizes = draw(st.lists(st.integers(1, 6), min_size=1, max_size=4))
    groups = tuple(ChannelGroup(f"g{i}", n) for i, n in enumerate(sizes))
    tensors: list[TensorSpec] = []
    layers: list[LayerRow] = []

    def layer(name: str, out: Axis, into: Axis) -> None:
        kernel = draw(st.sampled_from([0, 1, 3]))
        transposed = draw(st.booleans())
        axes = (into, out) if transposed else (out, into)
        kernel_axes = (Axis.fixed(kernel),) * 2 if kernel else ()
        tensors.append(TensorSpec(f"{name}.weight", TensorKind.WEIGHT, axes + kernel_axes))
        layers.append(
            LayerRow(name, "Conv" if kernel else "Gemm", f"{name}.weight", draw(st.integers(1, 9)), int(transposed))
        )

    before = Axis.fixed(draw(st.integers(1, 3)))
    for g, size in enumerate(sizes):
        out = Axis((Segment(g, 0, size),))
        for writer in range(draw(st.integers(1, 2))):  # a second one writes to the same stream, as in residual nets
            layer(f"layer{g}.{writer}", out, before)
        if draw(st.booleans()):
            tensors.append(TensorSpec(f"depthwise{g}", TensorKind.WEIGHT, (out, *(Axis.fixed(n) for n in (1, 2, 2)))))
        if draw(st.booleans()):
            tensors += [TensorSpec(f"norm{g}.{k.value}", k, (out,)) for k in _VECTORS]
        before = draw(_reads(sizes, g))
    layer("head", Axis.fixed(draw(st.integers(1, 4))), before)
    if draw(st.booleans()):
        tensors.append(TensorSpec("temperature", TensorKind.WEIGHT, ()))
    activations = tuple(
        Activation(f"value{g}", Axis((Segment(g, 0, n),)), 4, draw(st.booleans())) for g, n in enumerate(sizes)
    )
    return Architecture("drawn", groups, tuple(tensors), tuple(layers), activations, (3, 4, 4), (4,))


@st.composite
def _reads(draw: st.DrawFn, sizes: list[int], newest: int) -> Axis:
    """An axis that reads the newest group, perhaps flattened, in two parts, beside an older group or fixed indices."""
    inner = draw(st.sampled_from([1, 1, 4]))
    size = sizes[newest]
    segments = [Segment(newest, 0, size, inner)]
    if size > 1 and draw(st.booleans()):
        cut = draw(st.integers(1, size - 1))
        segments = [Segment(newest, cut, size - cut, inner), Segment(newest, 0, cut, inner)]
    if newest and draw(st.booleans()):
        older = draw(st.integers(0, newest - 1))
        segments.insert(draw(st.integers(0, len(segments))), Segment(older, 0, sizes[older]))
    if draw(st.booleans()):
        segments.append(Segment(FIXED, 0, draw(st.integers(1, 3))))
    return Axis(tuple(segments))


@st.composite
def widths(draw: st.DrawFn, architecture: Architecture) -> tuple[int, ...]:
    """Any valid widths."""
    return tuple(draw(st.integers(1, n)) for n in architecture.sizes)


@st.composite
def ranks(draw: st.DrawFn, architecture: Architecture) -> tuple[list[int], ...]:
    """Any ranks."""
    return tuple(draw(st.permutations(range(n))) for n in architecture.sizes)


@st.composite
def selections(draw: st.DrawFn, architecture: Architecture) -> Selection:
    """Any selection, with the channels' own order in half of the cases."""
    order = draw(st.none() | ranks(architecture))
    return Selection.of(architecture, draw(widths(architecture)), order)


seeds = st.integers(0, 2**32 - 1)


def model(architecture: Architecture, seed: int, scale: float = 1.0) -> Tensors:
    """A full model of normal numbers; variances are positive."""
    random = np.random.default_rng(seed)
    out: Tensors = {}
    for spec in architecture.tensors:
        value = np.asarray(random.normal(size=spec.shape) * scale, np.float32).reshape(spec.shape)
        out[spec.name] = np.abs(value) if spec.kind is TensorKind.STAT_VAR else value
    return {k: np.asarray(v) for k, v in out.items()}


def perturb_submodel(selection: Selection, base: Tensors, seed: int, scale: float = 0.1) -> Tensors:
    """A submodel as it might come back: what was extracted, moved by normal numbers."""
    random = np.random.default_rng(seed)
    out: Tensors = {}
    for name, value in selection.gather(base).items():
        new_value = np.asarray(value + random.normal(size=value.shape) * scale, np.float32).reshape(value.shape)
        kind = selection.architecture.by_name[name].kind
        out[name] = np.asarray(np.abs(new_value)) if kind is TensorKind.STAT_VAR else new_value
    return out


@st.composite
def rounds(draw: st.DrawFn, has_full_widths: bool = False, most: int = 5) -> tuple[Architecture, Tensors, list[Update]]:
    """A round: a base and updates of any widths, of common, of own or of various ranks."""
    architecture = draw(architectures())
    base = model(architecture, draw(seeds))
    common = draw(st.none() | ranks(architecture))
    updates = []
    for _ in range(draw(st.integers(1, most))):
        order = draw(ranks(architecture)) if draw(st.integers(0, 3)) == 0 else common
        sizes = architecture.sizes if has_full_widths else draw(widths(architecture))
        selection = Selection.of(architecture, sizes, order)
        weight, steps = draw(st.integers(1, 10_000)), draw(st.integers(1, 50))
        updates.append((selection, perturb_submodel(selection, base, draw(seeds)), weight, steps))
    return architecture, base, updates
