"""The agent pulls what weights can be decoded from, and the weights themselves where that leads nowhere."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fedprune.core import tensorfile
from fedprune.model.selection import Tensors
from fedprune.updates import Codec, weights
from fedprune.wire.messages import BlobRequest, Offer, Refusal
from fedprune_device.data.dataset import LocalData
from support.fakes.agent_harness import Bench

pytestmark = pytest.mark.board

INT8 = Codec("int8")


class Rounds(Bench):
    """A server whose second round's weights are a difference to the first's, and the board."""

    def __init__(self, root: Path, graphs: Path, first: Tensors, data: LocalData) -> None:
        super().__init__(root, graphs, first, data)
        self.first = first
        self.stop_on(Refusal)
        moved = {n: (v + np.float32(0.01)).astype(np.float32) for n, v in first.items()}
        self.raw = weights.encode(INT8, moved, first, set(first))
        self.second = weights.decode(INT8, self.raw, first, 10**6)
        self.server.plan = [self.server.offer(1, weights_codec="int8"), self.offer(self.raw)]

    def offer(self, raw: bytes) -> Offer:
        put = self.server.blobs.put
        held = self.server.weights.sha256
        whole = put(tensorfile.encode(self.second))
        return self.server.offer(2, weights=whole, weights_codec="int8", coded=put(raw), held=held)

    @property
    def input_gradient(self) -> set[str]:
        return {m.sha256 for m in self.server.of(BlobRequest)}

    def trained_on(self) -> str:
        return self.server.updates[2].base


@pytest.fixture
def rounds(tmp_path: Path, graphs: Path, weights: Tensors, data: LocalData) -> Rounds:
    return Rounds(tmp_path, graphs, weights, data)


def named(offer: Offer) -> tuple[str, str]:
    """Digests of the weights and of what they can be decoded from."""
    return offer.weights.sha256, offer.coded.sha256


def test_a_difference_is_pulled_instead_of_the_weights(rounds: Rounds) -> None:
    rounds.run()
    whole, coded = named(rounds.server.plan[1])
    assert coded in rounds.input_gradient
    assert whole not in rounds.input_gradient
    assert rounds.trained_on() == whole


def test_without_the_old_weights_the_new_ones_are_pulled(rounds: Rounds) -> None:
    rounds.server.plan = rounds.server.plan[1:]
    rounds.run()
    whole, coded = named(rounds.server.plan[0])
    assert whole in rounds.input_gradient
    assert coded not in rounds.input_gradient


@pytest.mark.parametrize("what", ["rubbish", "others"])
def test_what_leads_to_other_weights_costs_a_pull_and_no_round(rounds: Rounds, what: str) -> None:
    other = {n: (v + np.float32(1)).astype(np.float32) for n, v in rounds.first.items()}
    raw = b"rubbish" * 99 if what == "rubbish" else weights.encode(INT8, other, rounds.first, set(other))
    rounds.server.plan[1] = rounds.offer(raw)
    rounds.run()
    assert set(named(rounds.server.plan[1])) <= rounds.input_gradient
    assert rounds.trained_on() == named(rounds.server.plan[1])[0]
    assert not rounds.server.of(Refusal)
