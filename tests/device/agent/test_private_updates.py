"""Private updates on a board: what leaves it is clipped and noised anew each time, and what serves is neither."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from msgspec import structs

from fedprune.aggregation.fixed_point import Range
from fedprune.core import tensorfile
from fedprune.core.errors import ConfigError
from fedprune.model.element_mask import pack_active
from fedprune.model.recipe import Recipe
from fedprune.secure_aggregation.vector_form import TensorGrid, VectorForm
from fedprune.updates import Codec, decode
from fedprune.updates.clipped_noise import GaussianNoise
from fedprune.wire.messages import Offer
from fedprune_device.storage.local_state import LocalState
from fedprune_device.storage.state_directory import DeviceStore
from fedprune_device.training.evaluation import MACHINE_METRICS
from fedprune_device.training.round_runner import RoundRunner
from support.fakes.hidden_board import DEVICE, HiddenBoard, hidden_weights

pytestmark = pytest.mark.board

PLAIN = Recipe(epochs=1, batch_size=16)
SENT = hidden_weights(seed=1)
STATISTICS = ("mean", "var")


def carry_out(board: HiddenBoard, offer: Offer) -> tuple[bytes, Any, LocalState | None]:
    """The update's bytes and message, and the newest record of what the board keeps."""
    with DeviceStore(board.root) as store:
        bench = RoundRunner(DEVICE, store.blobs, store.slots, board.data, states=store.local_states)
        update = bench.commit(bench.carry_out(offer))
        records = [LocalState.from_bytes(r) for r in store.local_states.read().values()]
        return (
            store.blobs.read(update.weights.sha256),
            update,
            max(records, key=lambda state: state.round, default=None),
        )


def private(board: HiddenBoard, clip: float, noise: float, **settings: Any) -> Any:
    recipe = replace(PLAIN, update_clip=clip, update_noise=noise)
    return board.carry_out(board.offer(1, recipe, SENT, graph="kept", **settings))


def test_a_huge_clip_without_noise_hands_in_the_very_bits_that_were_trained(board: HiddenBoard) -> None:
    _, plain, serves = board.carry_out(board.offer(1, PLAIN, SENT, graph="kept"))
    _, sent, serves_private = private(board, 1e6, 0.0)
    for name, value in plain.items():
        assert sent[name].tobytes() == (SENT if name in STATISTICS else plain)[name].tobytes(), name
        assert serves_private[name].tobytes() == serves[name].tobytes() == value.tobytes(), name


def test_an_update_is_as_long_as_it_may_be(board: HiddenBoard) -> None:
    _, sent, serves = private(board, 0.01, 0.0)
    changes = {n: sent[n].astype(np.float64) - SENT[n] for n in sent if n not in STATISTICS}
    assert math.sqrt(sum(float((v**2).sum()) for v in changes.values())) == pytest.approx(0.01, rel=1e-3)
    assert any(np.abs(serves[n] - SENT[n]).max() > 0.01 for n in changes), "what serves is not clipped"


def test_of_masked_tensors_the_active_elements_are_clipped_and_noised(board: HiddenBoard) -> None:
    random = np.random.default_rng(3)
    mask = {n: random.random(SENT[n].shape) < 0.5 for n in ("w1", "w2")}
    packed = pack_active(mask, SENT)
    for clip, noise in ((1e6, 0.0), (0.01, 0.0), (1e-6, 0.5)):
        recipe = replace(PLAIN, mask="hard", update_clip=clip, update_noise=noise)
        _, sent, serves = board.carry_out(board.offer(1, recipe, SENT, graph="masked", mask=mask))
        assert {n: v.shape for n, v in sent.items()} == {n: v.shape for n, v in packed.items()}
        change = np.concatenate([(sent[n] - packed[n]).ravel() for n in sent if n not in STATISTICS])
        if clip > 1:
            trained = pack_active(mask, serves)
            assert all(np.array_equal(sent[n], trained[n]) for n in sent if n not in STATISTICS)
        elif not noise:
            assert np.linalg.norm(change) == pytest.approx(clip, rel=1e-3)
        else:
            assert 0.3 < change.std() < 0.7


def test_noise_is_another_one_each_time_and_not_in_what_serves(board: HiddenBoard) -> None:
    _, first, serves = private(board, 1.0, 0.5)
    _, second, serves_again = private(board, 1.0, 0.5)
    for name in first:
        assert serves[name].tobytes() == serves_again[name].tobytes()
        assert np.array_equal(first[name], second[name]) == (name in STATISTICS), name
    noise = np.concatenate([(first[n] - second[n]).ravel() for n in first if n not in STATISTICS])
    assert 0.4 < noise.std() / math.sqrt(2) < 0.6  # of 91 elements


def test_the_vector_that_is_masked_is_of_the_noised_update(board: HiddenBoard) -> None:
    form = VectorForm({name: TensorGrid(Range(3, 1)) for name in SENT if name not in STATISTICS})
    secure = {"tensors": form.to_json(), "narrow": 0, "wide": 1 + sum(SENT[n].size for n in form.tensors)}
    recipe = replace(PLAIN, update_clip=0.1, update_noise=0.05)
    payloads = []
    for offered, vector_form in ((recipe, None), (replace(recipe, secure_aggregation=True), secure)):
        offer = board.offer(1, offered, SENT, graph="kept", secure=vector_form)
        with DeviceStore(board.root) as store:
            runner = RoundRunner(
                DEVICE, store.blobs, store.slots, board.data, noise=lambda offer: GaussianNoise.from_key(offer.round)
            )
            payloads.append(store.blobs.read(runner.commit(runner.carry_out(offer)).weights.sha256))
    noised, vector = payloads
    assert vector == form.encode(tensorfile.decode(noised), SENT)[0].to_bytes()


@pytest.mark.parametrize("text", ["int8", "top-k:0.25"])
def test_codecs_see_what_is_noised_alone(board: HiddenBoard, text: str) -> None:
    recipe = replace(PLAIN, update_clip=1e-6, update_noise=0.5)
    raw, _, state = carry_out(board, board.offer(1, recipe, SENT, graph="kept", codec=text))
    decoded = decode(Codec.parse(text), raw, SENT, set(SENT) - set(STATISTICS))
    change = np.concatenate([(decoded[n] - SENT[n]).ravel() for n in decoded if n not in STATISTICS])
    residuals = [] if state is None else [state.residual.get(n, np.zeros(0)).ravel() for n in SENT]
    # A millionth of an update and much noise: what travels, and what is left for later, is of the noise.
    assert 0.3 < np.sqrt((change**2).mean()) < 0.7
    assert all(np.abs(v).max(initial=0) < 2.5 for v in residuals)
    assert any(v.any() for v in residuals)


def test_a_private_board_tells_nothing_that_it_measured_on_samples(board: HiddenBoard) -> None:
    update, _, _ = board.carry_out(board.offer(1, PLAIN, SENT, graph="kept"))
    noised, _, _ = private(board, 1.0, 0.1)
    assert set(update.metrics) > set(noised.metrics) == MACHINE_METRICS
    assert (noised.samples, noised.steps) == (update.samples, update.steps)


def test_an_offer_that_would_tell_more_is_refused(board: HiddenBoard) -> None:
    offer = board.offer(1, PLAIN, SENT, graph="kept")
    revealing_offer = structs.replace(offer, recipe={**offer.recipe, "update_clip": 1.0, "report_squares": True})
    with pytest.raises(ConfigError, match=r"recipe\.report_squares"):
        board.carry_out(revealing_offer)
