"""Graphs that offers name: put once, kept while offers may name them, and no longer."""

from pathlib import Path
from typing import Any

import pytest

from fedprune.blobs.blob_store import BlobStore
from fedprune.coordination import State
from fedprune.jobs.state import DeviceTask, Progress
from fedprune.model.recipe import Recipe
from fedprune.model.selection import Selection
from fedprune.planning.probe_report import UNITS
from fedprune.runtime.precision import unpack_graphs
from fedprune.runtime.precision_files import precision_graphs
from fedprune.strategies.values import Submodel
from fedprune_export.pruning.model import Model
from fedprune_server.executor.offer_blobs import OfferBlobs
from fedprune_server.executor.offer_entries import offer_graphs
from fedprune_server.executor.retention import GRAPH_ROUNDS, BlobCollector

ROUNDS = 3 * GRAPH_ROUNDS
GRAPHS = ("training", "inference")


@pytest.fixture
def store(tmp_path: Path) -> BlobStore:
    return BlobStore(tmp_path, durable=False)


def graphs_of_offer(offers: OfferBlobs, model: Model, round_: int) -> set[str]:
    """Graphs of an offer whose widths and recipe no other round has."""
    sizes = model.architecture.sizes
    selection = Selection.of(model.architecture, (*sizes[:-1], 1 + round_ % sizes[-1]))
    frozen = tuple(n for i, n in enumerate([t.name for t in model.architecture.trainable][:-1]) if (round_ >> i) & 1)
    body = offers.body(Submodel(selection, selection.gather(model.tensors)), Recipe(frozen=frozen))
    return {body[name]["sha256"] for name in GRAPHS}


def test_boards_get_graphs_for_what_they_train_on(model: Model, store: BlobStore) -> None:
    offers = OfferBlobs(model, store)
    graphs = {unit: offers.training_ref(Recipe(), unit)["sha256"] for unit in UNITS}
    assert len(set(graphs.values())) == 2
    selection = Selection.of(model.architecture, model.architecture.sizes)
    submodel = Submodel(selection, selection.gather(model.tensors))
    assert {unit: offers.body(submodel, Recipe(), unit)["training"]["sha256"] for unit in UNITS} == graphs
    assert graphs["cpu"] == offers.training_ref(Recipe())["sha256"], "what no board has measured is the processor's"


def test_a_graph_that_was_deleted_is_made_again(model: Model, store: BlobStore) -> None:
    offers = OfferBlobs(model, store)
    first = graphs_of_offer(offers, model, 1)
    for digest in first:
        store.delete(digest)
    assert graphs_of_offer(offers, model, 1) == first
    assert all(store.has(digest) for digest in first)


def test_offers_bring_the_graphs_of_lower_precisions(model: Model, store: BlobStore) -> None:
    offers = OfferBlobs(model, store, ("float16", "int8"))
    selection = Selection.of(model.architecture, model.architecture.sizes)
    submodel = Submodel(selection, selection.gather(model.tensors))

    body = offers.body(submodel, Recipe())

    assert list(body["lowered"]) == ["float16", "int8"]
    for precision, ref in body["lowered"].items():
        assert set(unpack_graphs(store.read(ref["sha256"]), precision)) == set(precision_graphs(precision))
        assert ref["sha256"] in offer_graphs(body)
    assert offers.body(submodel, Recipe())["lowered"] == body["lowered"]
    assert "lowered" not in OfferBlobs(model, store).body(submodel, Recipe())


def task(progress: Progress, basis: int, **offer: Any) -> DeviceTask:
    cut_from = {"round": basis, "model": "", "ranking": "", "order": None, "memory": {}}
    return DeviceTask(1, (1,), progress=progress, basis=cut_from, **offer)


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
