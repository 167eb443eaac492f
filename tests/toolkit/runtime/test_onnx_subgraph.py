"""Parts of training graphs: the same numbers from less, and an error for whatever is no graph."""

from contextlib import suppress
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedprune.core.errors import ModelError
from fedprune.model import step_contract
from fedprune.model.recipe import Recipe
from fedprune.model.step_feeds import first_step_feeds
from fedprune.runtime.onnx_subgraph import Subgraphs, metadata_of, subgraph_for
from fedprune.runtime.session import OnnxSession
from support.paths import GRAPHS

pytestmark = pytest.mark.board

RECIPES = {
    "narrow": Recipe(optimizer="adam", proximal=0.1),
    "masked": Recipe(mask="hard"),
    "threshold": Recipe(mask="threshold"),
    "scaled": Recipe(scale=2.0),
    "kept": Recipe(),
    "plain": Recipe(),
    "adamw": Recipe(
        optimizer="adamw", clip_norm=1.0, batch_size=8, accumulate=2, label_smoothing=0.1, balance_classes=True
    ),
}


def feeds_for(name: str) -> tuple[bytes, OnnxSession, dict[str, Any]]:
    raw = (GRAPHS / f"{name}.onnx").read_bytes()
    session = OnnxSession(raw, training=True)
    rng = np.random.default_rng(3)
    tensors = {}
    for tensor, (_, shape) in session.inputs.items():
        if tensor not in step_contract.RESERVED_NAMES and "::" not in tensor:
            sizes = [d if isinstance(d, int) else 8 for d in shape]
            tensors[tensor] = np.abs(rng.standard_normal(sizes)).astype(np.float32)
    feeds = first_step_feeds(RECIPES[name], tensors, session.inputs, np.zeros(12, np.int64), 3)
    feeds |= {"x": rng.standard_normal((12, 6)).astype(np.float32), "y": rng.integers(0, 3, 12)}
    return raw, session, feeds


@pytest.mark.parametrize("name", ["narrow", "masked"])
def test_statistics_need_the_forward_pass_alone(name: str) -> None:
    raw, session, _ = feeds_for(name)
    statistics = [o for o in session.outputs if o in (step_contract.next_name("mean"), step_contract.next_name("var"))]
    subgraph = OnnxSession(subgraph_for(raw, statistics), training=True)
    assert set(subgraph.outputs) == set(statistics)
    assert {"y", "lr", "w2", "b2", "w1::momentum"}.isdisjoint(subgraph.inputs)
    assert {"x", "w1", "mean", "var"} <= set(subgraph.inputs)
    assert subgraph.metadata == session.metadata
    assert len(subgraph_for(raw, statistics)) < len(raw) / 2


def test_with_all_outputs_it_is_the_same_file() -> None:
    raw, session, _ = feeds_for("narrow")
    assert subgraph_for(raw, session.outputs) == raw


def test_a_part_that_the_next_round_needs_again_is_not_cut_again() -> None:
    raw, _, _ = feeds_for("plain")
    subgraphs, read = Subgraphs(), Mock(return_value=raw)
    first, second = (subgraphs.subgraph_for(read, ["loss"]) for _ in range(2))
    assert first == second == subgraph_for(raw, ["loss"])
    read.assert_called_once()
    assert subgraphs.subgraph_for(read, ["loss"], given_values=["logits"]) == subgraph_for(
        raw, ["loss"], given_values=["logits"]
    )


def test_an_output_that_is_not_there_is_named() -> None:
    raw, _, _ = feeds_for("plain")
    with pytest.raises(ModelError, match="lacks outputs: got accuracy"):
        subgraph_for(raw, ["loss", "accuracy"])


def error_of(raw: bytes, outputs: list[str]) -> str:
    try:
        subgraph_for(raw, outputs)
    except ModelError as error:
        return str(error)
    return ""


@given(st.binary(max_size=200))
def test_what_is_no_graph_is_refused_or_left_alone(raw: bytes) -> None:
    assert len(error_of(raw, [])) < 500


@given(st.data())
@settings(deadline=None)
def test_damaged_graphs_raise_nothing_but_model_errors(data: st.DataObject) -> None:
    raw = bytearray((GRAPHS / "plain.onnx").read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        position = data.draw(st.integers(0, len(raw) - 1))
        raw[position : position + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    assert len(error_of(bytes(raw), [step_contract.LOSS])) < 500


@pytest.mark.parametrize("name", RECIPES)
def test_what_the_maker_wrote_is_what_onnxruntime_reads(name: str) -> None:
    raw, session, _ = feeds_for(name)
    assert metadata_of(raw) == session.metadata


@settings(deadline=None)
@given(st.binary(max_size=200))
def test_what_is_no_graph_has_metadata_or_is_an_error(raw: bytes) -> None:
    with suppress(ModelError):
        assert isinstance(metadata_of(raw), dict)
