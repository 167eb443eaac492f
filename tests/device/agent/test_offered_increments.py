"""The agent pulls the increments that make a masked submodel, and the submodel itself where that leads nowhere."""

import numpy as np
import pytest

from fedprune.core import tensorfile
from fedprune.model.element_mask import mask_to_bits, pack_active
from fedprune.model.recipe import Recipe
from fedprune.updates import increments
from fedprune.wire.messages import BlobRequest, Offer, Refusal
from support.fakes.agent_harness import Bench
from support.fakes.hidden_board import HIDDEN, hidden_weights
from support.paths import GRAPHS

pytestmark = pytest.mark.board


def split_offer(bench: Bench, damaged: int | None = None) -> Offer:
    """An offer of a submodel in two increments; a damaged one is of other weights."""
    put, weights, random = bench.server.blobs.put, hidden_weights(seed=1), np.random.default_rng(2)
    ranks = {n: random.random(weights[n].shape) for n in ("w1", "w2")}
    masks = [{n: r < share for n, r in ranks.items()} for share in (0.3, 0.6)]
    raw = [increments.encode(weights, smaller, mask) for smaller, mask in zip((None, masks[0]), masks, strict=True)]
    if damaged is not None:
        raw[damaged] = increments.encode(hidden_weights(seed=3), (None, masks[0])[damaged], masks[damaged])
    return bench.server.offer(
        1,
        Recipe(epochs=1, batch_size=16, mask="hard"),
        widths=(HIDDEN,),
        training=put((GRAPHS / "masked.onnx").read_bytes()),
        inference=put((GRAPHS / "hidden.onnx").read_bytes()),
        weights=put(tensorfile.encode(pack_active(masks[1], weights))),
        mask=put(tensorfile.encode(mask_to_bits(masks[1]))),
        increments=tuple(map(put, raw)),
    )


def run_round(bench: Bench, offer: Offer) -> tuple[set[str], set[str]]:
    """Digests that the board pulled, of increments and of the whole submodel."""
    bench.server.plan = [offer]
    bench.stop_on(Refusal)
    bench.run()
    assert not bench.server.of(Refusal)
    assert bench.server.updates[1].base == offer.weights.sha256
    pulled = {m.sha256 for m in bench.server.of(BlobRequest)}
    assert offer.mask is not None
    return pulled & {r.sha256 for r in offer.increments}, pulled & {offer.weights.sha256, offer.mask.sha256}


def test_increments_are_pulled_instead_of_weights_and_mask(bench: Bench) -> None:
    offer = split_offer(bench)
    assert run_round(bench, offer) == ({r.sha256 for r in offer.increments}, set())


@pytest.mark.parametrize("damaged", [0, 1])
def test_increments_of_other_weights_cost_a_pull_and_no_round(bench: Bench, damaged: int) -> None:
    increments_pulled, whole = run_round(bench, split_offer(bench, damaged))
    assert len(increments_pulled) == len(whole) == 2
