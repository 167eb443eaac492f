"""Graphs that offers name: put once, kept while offers may name them, and no longer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedprune.blobs.blob_store import BlobStore
from fedprune.coordination import State
from fedprune.jobs.state import Progress, Task
from fedprune.model.recipe import Recipe
from fedprune.model.selection import Selection
from fedprune.planning.probe_report import UNITS
from fedprune.runtime.precision import unpacked
from fedprune.runtime.precision_files import graphs_of
from fedprune.strategies.values import Submodel
from fedprune.wire.messages import Offer
from fedprune_device.data.dataset import LocalData
from fedprune_device.serving.model_slots import ModelSlots
from fedprune_device.serving.reduced_precision import ReducedPrecision
from fedprune_device.training.round_runner import RoundRunner
from fedprune_export.importing import import_onnx
from fedprune_export.pruning.model import Model
from fedprune_server.executor.offers import GRAPH_ROUNDS, Offers, sent
from fedprune_server.executor.offers import graphs_of as named_graphs
from fedprune_server.executor.retention import BlobCollector
from fedprune_server.simulation.digits import digits_model

ROUNDS = 3 * GRAPH_ROUNDS
GRAPHS = ("training", "inference")


@pytest.fixture(scope="module")
def model() -> Model:
    return import_onnx(digits_model(), "digits")


@pytest.fixture
def store(tmp_path: Path) -> BlobStore:
    return BlobStore(tmp_path, durable=False)


def named(offers: Offers, model: Model, round_: int) -> set[str]:
    """Graphs of an offer whose widths and recipe no other round has."""
    sizes = model.architecture.sizes
    widths = (*sizes[:-1], 1 + round_ % sizes[-1])
    selection = Selection.of(model.architecture, widths)
    trained = [t.name for t in model.architecture.trainable]
    frozen = tuple(n for i, n in enumerate(trained[:-1]) if (round_ >> i) & 1)
    body = offers.body(Submodel(selection, selection.gather(model.tensors)), Recipe(frozen=frozen), round_)
    return {body[name]["sha256"] for name in GRAPHS}


def test_a_graph_that_is_named_in_every_round_is_made_once(
    model: Model, store: BlobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    offers = Offers(model, store)
    first = offers.training(Recipe(), 1)
    monkeypatch.setattr("fedprune_server.executor.offers.training_graph", None)
    assert all(offers.training(Recipe(), r) == first for r in range(1, ROUNDS))
    assert first["sha256"] in offers.graphs()


def test_boards_get_graphs_for_what_they_train_on(model: Model, store: BlobStore) -> None:
    offers = Offers(model, store)
    graphs = {unit: offers.training(Recipe(), 1, unit)["sha256"] for unit in UNITS}
    assert len(set(graphs.values())) == 2
    selection = Selection.of(model.architecture, model.architecture.sizes)
    submodel = Submodel(selection, selection.gather(model.tensors))
    assert {unit: offers.body(submodel, Recipe(), 1, unit)["training"]["sha256"] for unit in UNITS} == graphs
    assert graphs["cpu"] == offers.training(Recipe(), 1)["sha256"], "what no board has measured is the processor's"


def test_a_graph_that_was_deleted_is_made_again(model: Model, store: BlobStore) -> None:
    offers = Offers(model, store)
    first = named(offers, model, 1)
    for digest in first:
        store.delete(digest)
    assert named(offers, model, 1) == first
    assert all(store.has(digest) for digest in first)


def test_offers_bring_the_graphs_of_lower_precisions(model: Model, store: BlobStore) -> None:
    offers = Offers(model, store, ("float16", "int8"))
    selection = Selection.of(model.architecture, model.architecture.sizes)
    submodel = Submodel(selection, selection.gather(model.tensors))

    body = offers.body(submodel, Recipe(), 1)

    assert list(body["lowered"]) == ["float16", "int8"]
    for precision, ref in body["lowered"].items():
        assert set(unpacked(store.read(ref["sha256"]), precision)) == set(graphs_of(precision))
        assert ref["sha256"] in offers.graphs() & named_graphs(body)
    assert offers.body(submodel, Recipe(), 2)["lowered"] == body["lowered"]
    assert "lowered" not in Offers(model, store).body(submodel, Recipe(), 1)


def test_what_an_offer_brings_serves_on_a_board(model: Model, store: BlobStore, tmp_path: Path) -> None:
    architecture = model.architecture
    widths = tuple(-(-s // 2) for s in architecture.sizes)
    selection = Selection.of(architecture, widths)
    recipe = Recipe(epochs=1, batch_size=16, lr=0.01)
    body = Offers(model, store, ("float16", "int8")).body(
        Submodel(selection, selection.gather(model.tensors)), recipe, 1
    )
    facts = {"architecture": architecture.digest, "selection": selection.digest, "widths": widths, "classes": 10}
    rng = np.random.default_rng(0)
    x = rng.standard_normal((80, *architecture.input_shape)).astype(np.float32)
    data = LocalData(x, rng.integers(0, 10, 80), x[:0], np.zeros(0, np.int64))
    slots = ModelSlots(tmp_path / "serving")
    slots.prepare()

    for precision in ("float16", "int8"):
        offer = Offer("j", 1, 0, 7, **facts, **sent(body))
        bench = RoundRunner("d", store, slots, data, lowering=ReducedPrecision(precision))
        bench.commit(bench.make(offer))

        predictor, record = slots.open()
        assert record.precision == precision
        assert predictor.predict(x).shape == (80, 10)


def task(progress: Progress, basis: int, **offer: Any) -> Task:
    cut_from = {"round": basis, "model": "", "ranking": "", "order": None, "memory": {}}
    return Task(1, (1,), progress=progress, basis=cut_from, **offer)


def test_collector_keeps_graphs_that_offers_may_name(store: BlobStore) -> None:
    collector = BlobCollector(store, 1, "accuracy")
    graphs = [store.put(b"graph %d" % i).sha256 for i in range(ROUNDS + 1)]
    for round_, digest in enumerate(graphs):
        collector.keep_graphs([digest], round_)
    offer = {"inference": {"sha256": graphs[0], "size": 1}}
    state = State("", round=ROUNDS, tasks={"a": task(Progress.OFFERED, 0, offer=offer)})

    collector.collect(state, set())
    assert [store.has(g) for g in graphs] == [i == 0 or i >= ROUNDS - GRAPH_ROUNDS for i in range(ROUNDS + 1)]

    state.tasks.clear()
    collector.mark({graphs[0]})
    collector.collect(state, set())
    assert [store.has(g) for g in graphs] == [i >= ROUNDS - GRAPH_ROUNDS for i in range(ROUNDS + 1)]


def test_collector_and_offers_agree_on_what_is_in_use(model: Model, store: BlobStore) -> None:
    """A part of an earlier round may be made again, say after a restart."""
    offers, collector = Offers(model, store), BlobCollector(store, 1, "accuracy")
    sizes = model.architecture.sizes
    for round_ in (2 * GRAPH_ROUNDS, GRAPH_ROUNDS + 2, GRAPH_ROUNDS + 4, 2 * GRAPH_ROUNDS + 1):
        widths = (*sizes[:-1], sizes[-1] - len(offers.graphs()))
        collector.keep_graphs([offers.inference(widths, round_)["sha256"]], round_)
    named = offers.graphs()
    assert len(named) == 4
    for round_, left in ((3 * GRAPH_ROUNDS, 4), (3 * GRAPH_ROUNDS + 1, 1), (3 * GRAPH_ROUNDS + 2, 0)):
        collector.collect(State("", round=round_), set())
        offers.note([], round_)
        assert {g for g in named if store.has(g)} == offers.graphs()
        assert len(offers.graphs()) == left
