"""The agent pulls what weights can be decoded from, and the weights themselves where that leads nowhere."""

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
        next_weights = {n: (v + np.float32(0.01)).astype(np.float32) for n, v in first.items()}
        self.raw = weights.encode(INT8, next_weights, first, set(first))
        self.second = weights.decode(INT8, self.raw, first, 10**6)
        self.server.plan = [self.server.offer(1, weights_codec="int8"), self.offer(self.raw)]

    def offer(self, raw: bytes) -> Offer:
        put = self.server.blobs.put
        base_digest = self.server.weights.sha256
        full_weights = put(tensorfile.encode(self.second))
        return self.server.offer(2, weights=full_weights, weights_codec="int8", coded=put(raw), held=base_digest)

    @property
    def pulled_blobs(self) -> set[str]:
        return {m.sha256 for m in self.server.of(BlobRequest)}

    def trained_on(self) -> str:
        return self.server.updates[2].base


@pytest.fixture
def rounds(tmp_path: Path, graphs: Path, weights: Tensors, data: LocalData) -> Rounds:
    return Rounds(tmp_path, graphs, weights, data)


def weight_digests(offer: Offer) -> tuple[str, str]:
    """Digests of the weights and of what they can be decoded from."""
    return offer.weights.sha256, offer.coded.sha256


def test_a_difference_is_pulled_instead_of_the_weights(rounds: Rounds) -> None:
    rounds.run()
    full, coded = weight_digests(rounds.server.plan[1])
    assert coded in rounds.pulled_blobs
    assert full not in rounds.pulled_blobs
    assert rounds.trained_on() == full


def test_without_the_old_weights_the_new_ones_are_pulled(rounds: Rounds) -> None:
    rounds.server.plan = rounds.server.plan[1:]
    rounds.run()
    full, coded = weight_digests(rounds.server.plan[0])
    assert full in rounds.pulled_blobs
    assert coded not in rounds.pulled_blobs


@pytest.mark.parametrize("what", ["rubbish", "others"])
def test_what_leads_to_other_weights_costs_a_pull_and_no_round(rounds: Rounds, what: str) -> None:
    other_weights = {n: (v + np.float32(1)).astype(np.float32) for n, v in rounds.first.items()}
    raw = (
        b"rubbish" * 99 if what == "rubbish" else weights.encode(INT8, other_weights, rounds.first, set(other_weights))
    )
    rounds.server.plan[1] = rounds.offer(raw)
    rounds.run()
    assert set(weight_digests(rounds.server.plan[1])) <= rounds.pulled_blobs
    assert rounds.trained_on() == weight_digests(rounds.server.plan[1])[0]
    assert not rounds.server.of(Refusal)
