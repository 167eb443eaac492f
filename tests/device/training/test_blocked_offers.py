"""Offers with a graph in blocks of channels: a board takes what it can use, and loses nothing by a wrong one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedprune.blobs.blob_ref import BlobRef
from fedprune.core.errors import ConfigError, ModelError, TrainingError
from fedprune.model import step_contract
from fedprune.model.recipe import Recipe
from fedprune.model.selection import Tensors
from fedprune.runtime import blocks
from fedprune.wire.messages import BlobRequest, Offer, Progress, Refusal, Update
from fedprune_device.data.dataset import LocalData
from fedprune_device.storage.state_directory import DeviceStore
from fedprune_device.training import graph_choice
from fedprune_device.training.graph_choice import GraphChoice
from fedprune_device.training.offline_training import OfflineTraining
from fedprune_device.training.round_runner import RoundRunner
from fedprune_device.training.trainer import Trainer
from support.fakes.agent_harness import Bench

pytestmark = pytest.mark.board

Here = Callable[[int], None]


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> Here:
    """Says what the check finds on this board."""

    def say(block: int) -> None:
        monkeypatch.setattr(blocks, "block_size", lambda: block)
        monkeypatch.setattr(graph_choice, "block_size", lambda: block)

    return say


def made_for(graph: bytes, block: int) -> bytes:
    """A graph of standard operators that says it was made for blocks: a field of ONNX's `ModelProto` more."""
    entry = b"".join(
        bytes([tag, len(text)]) + text for tag, text in ((0x0A, step_contract.BLOCK.encode()), (0x12, b"%d" % block))
    )
    return graph + bytes([0x72, len(entry)]) + entry


class Fleet(Bench):
    """A board and its server, whose offers bring a graph for blocks of 16."""

    def __init__(self, root: Path, graphs: Path, weights: Tensors, data: LocalData) -> None:
        super().__init__(root, graphs, weights, data)
        self.weights, self.graph = weights, (graphs / "plain.onnx").read_bytes()
        self.blocked = self.server.blobs.put(made_for(self.graph, 16))

    def offer(self, number: int, recipe: Recipe | None = None, **other: Any) -> Offer:
        return self.server.offer(number, recipe, **{"blocked": {"16": self.blocked}, **other})

    def wanted(self) -> set[str]:
        return {m.sha256 for m in self.server.of(BlobRequest)}

    def right(self, number: int, recipe: Recipe | None = None) -> bool:
        """Whether a round ended with the very numbers that training gives."""
        found, trainer = self.server.result(number), Trainer(self.graph)
        recipe = recipe or Recipe(epochs=2, batch_size=16)
        tensors = trainer.train(self.weights, self.data, recipe, seed=7, device="d", round=number, classes=3).tensors
        return all(np.array_equal(found[n], tensors[n]) for n in tensors)


@pytest.fixture
def fleet(tmp_path: Path, graphs: Path, weights: Tensors, data: LocalData) -> Fleet:
    return Fleet(tmp_path, graphs, weights, data)


def test_a_board_with_these_blocks_pulls_their_graph_too(fleet: Fleet, here: Here) -> None:
    here(16)
    fleet.server.plan = [fleet.offer(1)]
    fleet.run()
    assert fleet.right(1)
    assert {fleet.blocked.sha256, fleet.server.graphs["plain"].sha256} <= fleet.wanted()


@pytest.mark.parametrize("block", [0, 4, 8])
def test_a_board_with_others_pulls_the_graph_of_standard_operators(fleet: Fleet, here: Here, block: int) -> None:
    here(block)
    fleet.server.plan = [fleet.offer(1), fleet.offer(2)]
    fleet.run()
    assert fleet.right(1)
    assert fleet.right(2)
    assert fleet.blocked.sha256 not in fleet.wanted()
    assert not fleet.server.of(Refusal)


def test_a_board_that_trains_on_a_gpu_takes_standard_operators(fleet: Fleet, here: Here) -> None:
    here(16)
    fleet.server.plan = [fleet.offer(1)]
    fleet.run(cuda=True)
    assert fleet.right(1)
    assert fleet.blocked.sha256 not in fleet.wanted()


def test_a_graph_that_is_not_what_the_offer_says_costs_a_download(fleet: Fleet, here: Here) -> None:
    here(16)
    lie = fleet.server.blobs.put(made_for(fleet.graph, 8))
    other = fleet.server.blobs.put(made_for(made_for(fleet.graph, 8), 8))
    fleet.server.plan = [fleet.offer(1, blocked={"16": lie}), fleet.offer(2, blocked={"16": other})]
    fleet.run()
    assert fleet.right(1)
    assert fleet.right(2)
    assert not fleet.server.of(Refusal)
    assert lie.sha256 in fleet.wanted()
    assert other.sha256 not in fleet.wanted()  # once was enough


def test_a_graph_that_onnxruntime_doesn_t_load_costs_a_download(fleet: Fleet, here: Here) -> None:
    here(16)
    fleet.server.plan = [fleet.offer(1, blocked={"16": fleet.server.blobs.put(b"no graph")})]
    fleet.run()
    assert fleet.right(1)
    assert not fleet.server.of(Refusal)


def test_what_is_wrong_with_both_graphs_is_refused(fleet: Fleet, here: Here) -> None:
    here(16)
    broken = fleet.server.blobs.put(b"no graph")
    fleet.server.plan = [fleet.offer(1, blocked={"16": broken}, training=broken)]
    fleet.stop_on(Refusal)
    fleet.run()
    assert fleet.server.of(Refusal)
    assert not fleet.server.updates


@pytest.mark.slow
def test_a_round_that_was_cut_off_goes_on_with_another_processor(fleet: Fleet, here: Here) -> None:
    recipe = Recipe(epochs=300, batch_size=1, lr=1e-4)
    here(16)
    fleet.server.plan = [fleet.offer(1, recipe)]
    fleet.stop_on(Progress, phase="train")
    fleet.run()
    assert not fleet.server.of(Update)

    here(8)  # the card moved to another board
    fleet.server.react = lambda _: None
    fleet.run()
    assert fleet.right(1, recipe)
    assert not fleet.server.of(Refusal)


def test_an_update_that_waits_is_not_trained_again_with_another_processor(fleet: Fleet, here: Here) -> None:
    here(16)
    fleet.server.plan, fleet.server.accepts = [fleet.offer(1)], False
    fleet.stop_on(Update)
    fleet.run()
    first = fleet.server.of(Update)[0]

    here(0)
    fleet.server.react, fleet.server.accepts = lambda _: None, True
    fleet.server.seen.clear()
    fleet.run()
    assert fleet.server.updates[1] == first
    assert not [p for p in fleet.server.of(Progress) if p.phase == "train"]


def test_alone_a_board_trains_without_another_ones_graph(fleet: Fleet, here: Here) -> None:
    here(16)
    offer = fleet.offer(1)
    with DeviceStore(fleet.root / "state") as store:
        for ref in offer.blobs():
            store.blobs.put(fleet.server.blobs.read(ref.sha256))
        store.accept(offer)
        bench = RoundRunner("d", store.blobs, store.slots, fleet.data)
        bench.commit(bench.make(offer))
        store.finish()
        alone = OfflineTraining(store, bench, every=1.0)
        mine = alone._offer()
        assert mine is not None
        assert mine.blocked == offer.blocked
        here(8)
        other = alone._offer()
        assert other is not None
        assert not other.blocked


def test_only_what_a_graph_fails_at_is_tried_with_the_other_one(here: Here) -> None:
    here(16)
    ref = BlobRef("a" * 64, 10, "b" * 64)
    offer = Offer("j", 1, 0, 7, "a" * 64, "b" * 64, (3,), 3, ref, ref, ref, {}, blocked={"16": ref, "8": ref})
    choice = GraphChoice()
    suited = choice.suited(offer)
    assert suited == replace(offer, blocked={"16": ref})
    assert choice.suited(replace(offer, blocked={"8": ref})) == replace(offer, blocked=None)

    failed = TrainingError("the training graph failed")
    assert choice.instead(suited, failed) is None
    assert choice.instead(replace(offer, blocked=None), ModelError("no graph")) is None
    assert choice.suited(offer) == suited  # nothing was learnt from that
    failed.__cause__ = ModelError("no kernel")
    assert choice.instead(suited, failed) == replace(offer, blocked=None)
    assert choice.suited(offer) == replace(offer, blocked=None)


def test_blocks_can_be_turned_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "measured_block", lambda: 16)
    monkeypatch.setenv(blocks.OFF, "")
    assert blocks.block_size() == 16
    blocks.turn_off()
    assert blocks.block_size() == 0
    with pytest.raises(ModelError, match=r"switched off here \(FEDPRUNE_NO_BLOCKS or --no-blocks\)"):
        blocks.check_block({step_contract.BLOCK: "16"})


@pytest.mark.parametrize(
    ("said", "off"),
    [
        *((said, True) for said in ("1", "true", " Yes ", "ON")),
        *((said, False) for said in ("0", "False", "no", "off", "")),
    ],
)
def test_the_environment_says_yes_or_no(monkeypatch: pytest.MonkeyPatch, said: str, off: bool) -> None:
    monkeypatch.setattr(blocks, "measured_block", lambda: 16)
    monkeypatch.setenv(blocks.OFF, said)
    assert blocks.turned_off() == off
    assert blocks.block_size() == (0 if off else 16)


@pytest.mark.parametrize("said", ["2", "ja", "1 0", "--no-blocks"])
def test_anything_else_in_the_environment_is_refused(monkeypatch: pytest.MonkeyPatch, said: str) -> None:
    monkeypatch.setenv(blocks.OFF, said)
    with pytest.raises(ConfigError, match=f"{blocks.OFF} in the environment: expected 1, true, .* got '{said}'"):
        blocks.block_size()


def test_a_graph_for_other_blocks_is_refused_before_it_is_loaded(graphs: Path, tmp_path: Path, here: Here) -> None:
    here(16)
    plain = graphs / "plain.onnx"
    (tmp_path / "other.onnx").write_bytes(made_for(b"", 8))  # onnxruntime would say something else of it
    for other in (made_for(plain.read_bytes(), 8), tmp_path / "other.onnx"):
        with pytest.raises(ModelError, match=r"another kind of processor: expected blocks of 16 channels, got .*'8'"):
            Trainer(plain, blocked=other)
    with pytest.raises(ModelError, match="onnxruntime doesn't load it"):
        Trainer(plain, blocked=b"no graph")
    assert Trainer(plain, blocked=made_for(plain.read_bytes(), 16)).names


def test_the_log_says_why_a_board_trains_without_blocks(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    ref = BlobRef("a" * 64, 10, "b" * 64)
    offer = Offer("j", 1, 0, 7, "a" * 64, "b" * 64, (3,), 3, ref, ref, ref, {})
    dropout = replace(offer, recipe=Recipe(ordered_dropout=(0.5,)).to_offer())
    blocked = replace(offer, blocked={"16": ref})
    here(16)
    monkeypatch.setenv(blocks.OFF, "0")
    choice = GraphChoice()
    assert choice.described(blocked) == "in blocks of 16 channels"
    for given, why in (
        (dropout, "steps of this recipe are of several widths: ordered dropout"),
        (offer, "no graph for blocks of 16 channels was offered"),
    ):
        assert choice.described(given) == f"with standard operators ({why})"
    assert "a GPU has no blocks" in GraphChoice(standard=True).described(dropout)
    here(0)
    assert "this processor has no blocks" in choice.described(dropout)
    monkeypatch.setenv(blocks.OFF, "yes")
    assert "switched off: --no-blocks or FEDPRUNE_NO_BLOCKS" in choice.described(dropout)
    choice.instead(blocked, ModelError("no graph"))
    assert "it failed" in choice.described(offer)
