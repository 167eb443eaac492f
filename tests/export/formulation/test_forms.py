"""Which form a layer takes: what a board measured wins where it is clear, and what is usual everywhere else."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedprune.model import step_contract
from fedprune.model.architecture import widths_at
from fedprune.model.recipe import Features, Recipe
from fedprune.model.selection import Selection
from fedprune.model.step_contract import first_step
from fedprune.planning.probe_report import NAMES, FormTimes, Shape
from fedprune.runtime.blocks import block_size
from fedprune.runtime.session import Session
from fedprune_export.autodiff.conv_geometry import Window
from fedprune_export.formulation import Forms
from fedprune_export.importing import import_onnx
from fedprune_export.training.step_graph import training_graph
from fedprune_server.simulation.digits import digits_model


def window(side: int = 16, kernel: int = 3, stride: int = 1) -> Window:
    pads = ((kernel // 2, kernel // 2),) * 2
    return Window((side * stride,) * 2, (kernel,) * 2, (stride,) * 2, (1, 1), pads, (side, side))


def table(shape: Shape, **seconds: float) -> FormTimes:
    return FormTimes(((shape, tuple((name.replace("_", "."), s) for name, s in seconds.items())),))


SHAPE = Shape(3, 1, 32, 32, 256)


def test_the_fastest_kernel_gradient_is_taken_where_it_is_clear() -> None:
    clear = table(SHAPE, kernel_taps=3.0, kernel_products=2.0, kernel_columns=1.0)
    close = table(SHAPE, kernel_taps=1.05, kernel_products=1.0)

    assert Forms().kernel_gradient(window(), 32, 32) == "taps"
    assert Forms(times=clear).kernel_gradient(window(), 32, 32) == "columns"
    assert Forms(times=close).kernel_gradient(window(), 32, 32) == "taps"


def test_what_is_not_measured_stays_as_it_is() -> None:
    clear = table(SHAPE, kernel_taps=3.0, kernel_columns=1.0)

    assert Forms(times=clear).kernel_gradient(window(kernel=5), 32, 32) == "taps"
    assert Forms(times=clear).kernel_gradient(window(), 2048, 32) == "taps"
    assert Forms(times=table(SHAPE, kernel_columns=1.0)).kernel_gradient(window(), 32, 32) == "taps"


def test_input_gradients_by_standard_operators_are_chosen_for_stride_1_alone() -> None:
    fast = table(SHAPE, input_flipped=2.0, input_transposed=1.0)
    strided = table(Shape(3, 2, 32, 32, 256), input_flipped=0.1, input_transposed=1.0)

    assert Forms().dense(window(), 32, 32).input_gradient == "flipped"
    assert Forms(times=fast).dense(window(), 32, 32).input_gradient == "transposed"
    assert Forms(times=strided).dense(window(stride=2), 32, 32).input_gradient == "transposed"


def test_blocks_are_left_only_where_the_way_out_of_them_is_paid_for() -> None:
    def chosen(**seconds: float) -> bool:
        return Forms(16, 32, times=table(SHAPE, **seconds)).in_blocks(window(), 32, 32)

    assert Forms(16, 32).in_blocks(window(), 32, 32)
    assert not chosen(forward_blocks=2.0, forward_plain=1.0)
    assert chosen(forward_blocks=2.0, forward_plain=1.0, convert_plain=0.5)
    assert chosen(forward_blocks=1.05, forward_plain=1.0)


def test_few_channels_and_other_processors_are_never_in_blocks() -> None:
    fast = table(Shape(3, 1, 8, 8, 256), forward_blocks=1e-6, forward_plain=1.0)

    assert not Forms(16, 32, times=fast).in_blocks(window(), 8, 8)
    assert not Forms(0, times=table(SHAPE, forward_blocks=1e-6, forward_plain=1.0)).in_blocks(window(), 32, 32)


def test_depthwise_layers_have_times_of_their_own() -> None:
    shape = Shape(3, 1, 1, 96, 256, depthwise=True)
    forms = Forms(16, 32, times=table(shape, depthwise_blocks=3.0, depthwise_plain=1.0))

    assert not forms.in_blocks(window(), 1, 96, depthwise=True)
    assert forms.in_blocks(window(), 1, 96)


@given(st.dictionaries(st.sampled_from(NAMES), st.floats(1e-6, 1.0)), st.sampled_from([0, 16]))
def test_any_table_gives_a_form_that_there_is(seconds: dict[str, float], block: int) -> None:
    forms = Forms(block, 32 if block else 0, times=FormTimes(((SHAPE, tuple(seconds.items())),)))

    for side, stride, inputs, outputs in itertools.product((4, 16, 64), (1, 2), (3, 32), (16, 32)):
        w = window(side, stride=stride)
        assert forms.kernel_gradient(w, inputs, outputs) in ("taps", "products", "columns", "convolution", "blocked")
        assert block or forms.kernel_gradient(w, inputs, outputs) != "blocked"
        assert stride == 1 or forms.dense(w, inputs, outputs).input_gradient == "transposed"
    assert hash(forms) == hash(Forms(block, 32 if block else 0, times=FormTimes(((SHAPE, tuple(seconds.items())),))))


@pytest.mark.parametrize("block", sorted({0, block_size()}))
@pytest.mark.parametrize("seed", range(6))
def test_whatever_a_table_says_the_step_is_the_same(seed: int, block: int) -> None:
    random = np.random.default_rng(seed)
    model = import_onnx(digits_model(), "digits")
    shapes = [Shape(3, 1, i, o, n) for i, o, n in ((1, 32, 64), (32, 64, 64), (64, 128, 16))]
    rows = tuple((s, tuple((n, float(random.uniform(0.1, 9))) for n in NAMES)) for s in shapes)
    widths = widths_at(model.architecture, 1.0)
    tensors = Selection.of(model.architecture, widths).gather(model.tensors)
    x = random.standard_normal((5, *model.architecture.input_shape)).astype(np.float32)
    y = random.integers(0, 10, 5)

    results, operators = [], []
    for forms in (Forms(), Forms(block, 5 if block else 0, times=FormTimes(rows))):
        graph = training_graph(model, Features(), widths=widths, forms=forms)
        session = Session(graph.to_bytes(), training=True)
        more = first_step(Recipe(lr=0.1), tensors, session.inputs, 5, 10)
        results.append(session.run({step_contract.X: x, step_contract.Y: y, **more}))
        operators.append([n.op for n in graph.nodes])
    assert operators[0] != operators[1]
    for name, usual in results[0].items():
        np.testing.assert_allclose(results[1][name], usual, rtol=1e-3, atol=1e-4, err_msg=name)
    moved = [n for n in tensors if not np.array_equal(results[0][step_contract.following(n)], tensors[n])]
    assert any(n.startswith("conv2") for n in moved)
