"""Leading models onto each other's channels: against the paper's equations and identities."""

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedprune.core.errors import BundleError
from fedprune.model.architecture import Architecture, Axis, ChannelGroup, LayerRow, Segment, TensorKind, TensorSpec
from fedprune.model.cost_table import Volume
from fedprune.model.selection import Selection, Tensors
from fedprune.strategies.optimal_transport import aggregate, align, prune
from support.fakes.strategy_rounds import NET
from support.nets.drawn_models import architectures, model, ranks, seeds, selections
from support.nets.written_nets import written_net
from support.oracles.pot_plans import pot

Floats = npt.NDArray[Any]

pytest.importorskip("ot")
pytest.importorskip("scipy")


def dense_algorithm(source: Tensors, target: Tensors) -> dict[str, Floats]:
    """Algorithm 1 on `NET` with matrices in float64: two linear layers, a norm and a head."""
    out: dict[str, Floats] = {}
    before = np.eye(3)
    for layer, vectors in (("first", ("norm.weight", "norm.mean", "norm.variance")), ("second", ("second.bias",))):
        name = f"{layer}.weight"
        w = source[name].astype(np.float64) @ before
        plan = pot(np.sqrt(((w[:, None] - target[name].astype(np.float64)) ** 2).sum(2)))
        plan = plan / plan.sum(0)
        out[name] = plan.T @ w
        for vector in vectors:
            out[vector] = plan.T @ source[vector]
        before = plan
    out["head.weight"] = source["head.weight"] @ before
    out["head.bias"] = source["head.bias"].astype(np.float64)
    return out


@given(seeds, st.integers(2, 6), st.integers(1, 4), st.booleans())  # on a line, many plans are best
def test_alignment_is_the_paper_s_algorithm(seed: int, a: int, b: int, back: bool) -> None:
    full, small = Selection.full(NET), Selection.of(NET, (a, b))
    global_model, submodel = model(NET, seed), small.gather(model(NET, seed + 1))
    pairs = ((submodel, small), (global_model, full)) if back else ((global_model, full), (submodel, small))
    (source, source_at), (target, target_at) = pairs
    got = align(source, source_at, target, target_at)
    expected = dense_algorithm(source, target)
    assert list(got) == [t.name for t in NET.tensors]
    for name, value in got.items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-4, atol=1e-5, err_msg=name)


@given(st.data(), seeds)
def test_aligned_models_have_the_target_s_shapes_and_means_of_the_source_s_numbers(
    data: st.DataObject, seed: int
) -> None:
    architecture = data.draw(architectures())
    source_selection, target_selection = data.draw(selections(architecture)), data.draw(selections(architecture))
    source, target = (
        source_selection.gather(model(architecture, seed)),
        target_selection.gather(model(architecture, seed + 1)),
    )
    got = align(source, source_selection, target, target_selection)
    assert {n: v.shape for n, v in got.items()} == target_selection.shapes()
    for name, value in got.items():
        assert value.dtype == np.float32
        assert np.isfinite(value).all()
        assert not any(np.shares_memory(value, v) for v in source.values())
        assert value.min() >= source[name].min() - 1e-5
        assert value.max() <= source[name].max() + 1e-5


@given(st.data(), seeds)
def test_a_permuted_model_is_recovered_bit_for_bit_both_ways(data: st.DataObject, seed: int) -> None:
    """SubFLOT at ρ = 0: OTP gives the history, OTA the global model."""
    architecture = data.draw(architectures())
    global_model = model(architecture, seed)
    selection = Selection.of(architecture, architecture.sizes, data.draw(ranks(architecture)))
    submodel = selection.gather(global_model)
    there, back = prune(global_model, submodel, selection, alpha=1), aggregate(submodel, selection, global_model)
    for name in global_model:
        assert there[name].tobytes() == submodel[name].tobytes(), name
        assert back[name].tobytes() == global_model[name].tobytes(), name


@given(st.data(), seeds)
def test_alpha_mixes_the_aligned_model_and_the_history(data: st.DataObject, seed: int) -> None:
    architecture = data.draw(architectures())
    selection = data.draw(selections(architecture))
    global_model, history = model(architecture, seed), selection.gather(model(architecture, seed + 1))
    ends = prune(global_model, history, selection, alpha=0), prune(global_model, history, selection, alpha=1)
    middle = prune(global_model, history, selection)
    before = {n: v.tobytes() for n, v in history.items()}
    for name in global_model:
        assert ends[0][name].tobytes() == history[name].tobytes() == before[name]
        assert not np.shares_memory(ends[0][name], history[name])
        np.testing.assert_allclose(middle[name], (ends[1][name] + history[name]) / 2, atol=1e-6)


@given(st.data(), seeds)
@settings(max_examples=25)
def test_models_that_were_aligned_stay_as_they_are_while_others_are(data: st.DataObject, seed: int) -> None:
    """Layers are worked on in memory that is used again; what comes out of it is not."""
    architecture = data.draw(architectures())
    selection = data.draw(selections(architecture))
    first, second = model(architecture, seed), model(architecture, seed + 1)
    original_bytes = {n: v.tobytes() for n, v in first.items()}
    sent, lifted = (
        prune(first, selection.gather(second), selection),
        aggregate(selection.gather(second), selection, first),
    )
    before = [{n: v.tobytes() for n, v in m.items()} for m in (sent, lifted)]
    prune(second, selection.gather(first), selection)
    aggregate(selection.gather(first), selection, second)
    assert [{n: v.tobytes() for n, v in m.items()} for m in (sent, lifted)] == before
    assert {n: v.tobytes() for n, v in first.items()} == original_bytes


def residual_net() -> Architecture:
    """A residual net with a flattened head: all groups have even sizes, and all segments whole groups."""
    a, b = Axis((Segment(0, 0, 6),)), Axis((Segment(1, 0, 4),))
    k = Axis.fixed(3)
    weights = {
        "stem": (a, Axis.fixed(2), k, k),
        "up": (b, a, k, k),
        "depth": (b, Axis.fixed(1), k, k),
        "down": (a, b, k, k),
        "head": (Axis.fixed(3), Axis((Segment(0, 0, 6, 4), Segment(1, 0, 4)))),
    }
    tensors: list[TensorSpec] = []
    for name, axes in weights.items():
        tensors.append(TensorSpec(f"{name}.weight", TensorKind.WEIGHT, axes))
        if name != "head":
            kinds = (TensorKind.NORM_SCALE, TensorKind.NORM_BIAS, TensorKind.STAT_MEAN, TensorKind.STAT_VAR)
            tensors += [TensorSpec(f"{name}.{kind.value}", kind, (axes[0],)) for kind in kinds]
    layers = [LayerRow(n, "Conv", f"{n}.weight", 9) for n in weights if n != "depth"]
    depth = LayerRow(
        "depth", "Conv", "depth.weight", 9, input_volume=Volume((b,), 9), output_volume=Volume((b,), 9), groups=4
    )
    layers.insert(2, depth)
    architecture = Architecture(
        "doubled", (ChannelGroup("a", 6), ChannelGroup("b", 4)), tuple(tensors), tuple(layers), (), (2, 3, 3), (3,)
    )
    architecture.validate()
    return architecture


@given(seeds)
def test_a_depthwise_layer_has_no_plan_of_its_own(seed: int) -> None:
    net = residual_net()
    selection, full = Selection.of(net, (4, 3)), Selection.full(net)
    global_model, submodel = model(net, seed), selection.gather(model(net, seed + 1))
    scaled_submodel = {n: v * 5 + 1 if n.startswith("depth") else v for n, v in submodel.items()}
    got, same = align(global_model, full, submodel, selection), align(global_model, full, scaled_submodel, selection)
    assert all(got[n].tobytes() == same[n].tobytes() for n in got)


def rows(value: Floats) -> Floats:
    return value.reshape(len(value), -1).astype(np.float64)


def transported_inputs(value: Floats, plan: Floats) -> Floats:
    """W·T: a convolution's input axis."""
    return np.einsum("oikl,ij->ojkl", value.astype(np.float64), plan)


def plan_of(a: Floats, b: Floats) -> Floats:
    return pot(np.sqrt(((rows(a)[:, None] - rows(b)) ** 2).sum(2)))


@given(seeds)
def test_residual_branches_go_by_their_own_plans_and_readers_by_the_average(seed: int) -> None:
    net = residual_net()
    selection, full = Selection.of(net, (4, 3)), Selection.full(net)
    global_model, submodel = model(net, seed), selection.gather(model(net, seed + 1))
    got = align(global_model, full, submodel, selection)
    stem = plan_of(global_model["stem.weight"], submodel["stem.weight"])
    up = transported_inputs(global_model["up.weight"], stem)
    inner = plan_of(up, submodel["up.weight"])
    down = transported_inputs(global_model["down.weight"], inner)
    branch = plan_of(down, submodel["down.weight"])
    stream = (stem + branch) / 2
    expected = {
        "stem.weight": np.einsum("oikl,oj->jikl", global_model["stem.weight"], stem),
        "stem.norm_scale": stem.T @ global_model["stem.norm_scale"],
        "up.weight": np.einsum("oikl,oj->jikl", up, inner),
        "depth.weight": np.einsum("oikl,oj->jikl", global_model["depth.weight"], inner),
        "depth.stat_var": inner.T @ global_model["depth.stat_var"],
        "down.weight": np.einsum("oikl,oj->jikl", down, branch),
        "down.stat_mean": branch.T @ global_model["down.stat_mean"],
    }
    head = global_model["head.weight"].astype(np.float64)
    flat = np.einsum("cis,ij->cjs", head[:, :24].reshape(3, 6, 4), stream).reshape(3, -1)
    expected["head.weight"] = np.concatenate([flat, head[:, 24:] @ inner], axis=1)
    for name, value in expected.items():
        np.testing.assert_allclose(got[name], value, rtol=1e-4, atol=1e-5, err_msg=name)


EMBEDDED = written_net({"a": 4}, {"table": (7, "a"), "head.weight": (3, "a")}, (7,), (3,), layers=("head.weight",))
"""A table of words whose columns a linear layer reads; the table is no layer's weight."""


@given(seeds)
def test_an_embedding_s_columns_are_channels_and_its_words_keep_their_order(seed: int) -> None:
    net = EMBEDDED
    selection, full = Selection.of(net, (3,)), Selection.full(net)
    global_model, submodel = model(net, seed), selection.gather(model(net, seed + 1))
    plan = plan_of(global_model["table"].T, submodel["table"].T)
    got = align(global_model, full, submodel, selection)
    np.testing.assert_allclose(got["table"], global_model["table"] @ plan, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(got["head.weight"], global_model["head.weight"] @ plan, rtol=1e-4, atol=1e-5)


def test_models_that_don_t_fit_are_refused() -> None:
    global_model, full = model(NET, 0), Selection.full(NET)
    small = Selection.of(NET, (3, 2))
    with pytest.raises(BundleError, match=r"norm\.mean"):
        prune({n: v for n, v in global_model.items() if n != "norm.mean"}, small.gather(global_model), small)
    with pytest.raises(BundleError, match=r"first\.weight"):
        aggregate(global_model, small, global_model)
    with pytest.raises(BundleError, match="architectures"):
        align(global_model, full, global_model, Selection.full(residual_net()))
    with pytest.raises(BundleError, match="finite"):
        prune(global_model | {"first.weight": np.full((6, 3), np.nan, np.float32)}, global_model, full)
