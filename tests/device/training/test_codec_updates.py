"""Encoded updates of a board: what the server reads out of them, and what the board keeps for the next one."""

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from msgspec import structs

from fedprune.blobs.blob_ref import BlobRef
from fedprune.blobs.blob_store import BlobStore
from fedprune.core import tensorfile
from fedprune.model.element_mask import apply_mask, pack_active, unpack_active
from fedprune.model.recipe import Recipe
from fedprune.model.selection import Selection, Tensors
from fedprune.updates import Codec, decode, is_packed, weights
from fedprune.updates.relocation import make_relocation
from fedprune.wire.messages import Offer
from fedprune_device.network.offer_checks import fits_disk
from fedprune_device.storage.local_state import LocalState
from fedprune_device.storage.state_directory import DeviceStore
from fedprune_device.training.carried_state import carried_arrays
from fedprune_device.training.round_runner import DamagedBlobError, RoundRunner
from support.fakes.hidden_board import ARCHITECTURE, DEVICE, HiddenBoard, hidden_weights

pytestmark = pytest.mark.board

PLAIN = Recipe(epochs=1, batch_size=16)
STATISTICS = {"mean", "var"}


def carry_out(board: HiddenBoard, offer: Offer) -> tuple[bytes, Tensors, LocalState | None]:
    """The update's bytes, the tensors that serve, and the newest record of what the board keeps."""
    with DeviceStore(board.root) as store:
        bench = RoundRunner(DEVICE, store.blobs, store.slots, board.data, states=store.local_states)
        raw = store.blobs.read(bench.commit(bench.carry_out(offer)).weights.sha256)
        serves = tensorfile.load_tensors(board.root / "serving" / store.slots.current().slot / "weights.safetensors")
        records = [LocalState.from_bytes(r) for r in store.local_states.read().values()]
    return raw, serves, max(records, key=lambda state: state.round, default=None)


def read(raw: bytes, text: str, sent: Tensors) -> Tensors:
    codec = Codec.parse(text)
    assert codec is not None
    return decode(codec, raw, sent, set(sent) - STATISTICS)


@pytest.mark.parametrize("text", ["int8", "int4", "top-k:0.25"])
def test_an_update_is_encoded_as_offered_and_what_was_trained_serves(board: HiddenBoard, text: str) -> None:
    sent = hidden_weights(seed=1)
    plain, serves, _ = carry_out(board, board.offer(1, PLAIN, sent, graph="kept"))
    trained = tensorfile.decode(plain)
    raw, serves_coded, state = carry_out(board, board.offer(1, PLAIN, sent, graph="kept", codec=text))
    assert is_packed(raw)
    decoded = read(raw, text, sent)
    assert set(decoded) == set(trained)
    for name, value in trained.items():
        assert serves_coded[name].tobytes() == serves[name].tobytes() == value.tobytes()
        if name in STATISTICS:
            assert decoded[name] == pytest.approx(value, rel=2.0**-11 if text == "int4" else 0)
        else:
            assert decoded[name] + state.residual.get(name, 0) == pytest.approx(value, abs=1e-6)


def test_what_is_left_out_is_sent_with_the_next_update(board: HiddenBoard) -> None:
    one, two = hidden_weights(seed=1), hidden_weights(seed=2)
    offers = [board.offer(n, PLAIN, w, graph="kept", codec="int8") for n, w in ((1, one), (2, two))]
    _, _, first = carry_out(board, offers[0])
    raw, serves, second = carry_out(board, offers[1])
    decoded = read(raw, "int8", two)
    for name in second.residual:
        assert np.abs(first.residual[name]).max() > 0
        assert decoded[name] + second.residual[name] == pytest.approx(serves[name] + first.residual[name], abs=1e-6)


def test_a_masked_update_leaves_out_of_active_elements_alone(board: HiddenBoard) -> None:
    rng = np.random.default_rng(0)
    sent = hidden_weights(seed=1)
    mask = {"w1": rng.random(sent["w1"].shape) < 0.5, "w2": rng.random(sent["w2"].shape) < 0.5}
    masked = apply_mask(mask, sent)
    offer = board.offer(1, replace(PLAIN, mask="hard"), masked, graph="masked", mask=mask, codec="int8")
    raw, serves, state = carry_out(board, offer)
    decoded = unpack_active(mask, read(raw, "int8", pack_active(mask, masked)))
    for name in set(sent) - STATISTICS:
        assert decoded[name] + state.residual[name] == pytest.approx(serves[name], abs=1e-6)
    for name, active in mask.items():
        assert not state.residual[name][~active].any()


BEFORE = Selection.of(ARCHITECTURE, (6,), [[4, 1, 7, 0, 3, 2, 5, 6]])
NOW = Selection.of(ARCHITECTURE, (4,), [[7, 5, 4, 1, 0, 2, 3, 6]])
ALL_CHANNELS = {n: v for n, v in hidden_weights(seed=3).items() if n in ARCHITECTURE.by_name}


def own(selection: Selection = BEFORE) -> LocalState:
    place = (selection.digest, "c" * 64, selection.widths, 1)
    return LocalState("job", 7, "a" * 64, *place, residual=selection.gather(ALL_CHANNELS))


def relocating_offer(board: HiddenBoard, **fields: Any) -> tuple[Offer, Callable[[BlobRef], bytes]]:
    """An offer of another selection that says how channels have moved."""
    with DeviceStore(board.root) as store:
        relocation_ref = store.blobs.put(make_relocation(BEFORE, NOW))
    values = {"moved": relocation_ref, "moved_from": BEFORE.digest, "selection": NOW.digest, "codec": "int8", **fields}
    offer = board.offer(2, PLAIN, hidden_weights(), graph="kept", **values)
    return offer, lambda ref: BlobStore(board.root / "blobs").read(ref.sha256)


def test_channels_that_have_moved_keep_what_was_left_out(board: HiddenBoard) -> None:
    offer, read_blob = relocating_offer(board)
    expected = NOW.gather(ALL_CHANNELS)
    residual = carried_arrays(own().residual, own(), offer, expected, read_blob)
    assert set(residual) == set(expected)
    for name, axis in (("w1", 0), ("gamma", 0), ("w2", 1)):
        new, old = np.moveaxis(residual[name], axis, 0), np.moveaxis(expected[name], axis, 0)
        assert new[[0, 2, 3]].tobytes() == old[[0, 2, 3]].tobytes()
        assert not new[1].any()  # channel 5 wasn't there


# -- weights that come encoded ----------------------------------------------------------------------------------------


def coded_offer(board: HiddenBoard, text: str, base_weights: Tensors | None, **fields: Any) -> tuple[Offer, Tensors]:
    """An offer whose weights are not there, but what they can be decoded from; and these weights."""
    codec = Codec.parse(text)
    assert codec is not None
    new = hidden_weights(seed=4)
    raw = weights.encode(codec, new, base_weights, set(new) - STATISTICS)
    decoded = weights.decode(codec, raw, base_weights, 10**6)
    offer = board.offer(2, PLAIN, decoded, graph="kept", weights_codec=text)
    with DeviceStore(board.root) as store:
        store.blobs.delete(offer.weights.sha256)
        base_digest = None if base_weights is None else store.blobs.put(tensorfile.encode(base_weights)).sha256
        return structs.replace(offer, coded=store.blobs.put(fields.get("raw", raw)), held=base_digest), decoded


@pytest.mark.parametrize(("text", "based"), [("int8", False), ("int8", True), ("int4", True)])
def test_training_goes_on_from_weights_that_were_decoded(board: HiddenBoard, text: str, based: bool) -> None:
    offer, there = coded_offer(board, text, hidden_weights(seed=3) if based else None)
    update = tensorfile.decode(carry_out(board, offer)[0])
    plain = board.offer(2, PLAIN, there, graph="kept")
    assert plain.weights == offer.weights
    undecoded = tensorfile.decode(carry_out(board, plain)[0])
    assert {n: v.tobytes() for n, v in update.items()} == {n: v.tobytes() for n, v in undecoded.items()}


def test_weights_that_are_not_the_offered_ones_are_asked_for_as_they_are(board: HiddenBoard) -> None:
    base_weights = hidden_weights(seed=3)
    right, _ = coded_offer(board, "int8", base_weights)
    other_update = weights.encode(Codec("int8"), hidden_weights(seed=5), base_weights, set(base_weights) - STATISTICS)
    for raw in (other_update, b"", b"rubbish", other_update[:-1]):
        offer, _ = coded_offer(board, "int8", base_weights, raw=raw)
        with pytest.raises(DamagedBlobError) as caught:
            carry_out(board, offer)
        assert caught.value.sha256 == offer.coded.sha256
    with pytest.raises(DamagedBlobError) as caught:
        carry_out(board, structs.replace(right, held="f" * 64))
    assert caught.value.sha256 == "f" * 64


def test_what_is_left_out_needs_room(board: HiddenBoard) -> None:
    plain = board.offer(1, PLAIN, hidden_weights())
    with DeviceStore(board.root) as store:
        for codec, copies in ((None, 2), ("int8", 5)):
            for lacking in (0, 1):
                room = copies * plain.weights.size - lacking
                disk: Any = SimpleNamespace(blobs=store.blobs, free_bytes=lambda room=room: room)
                assert fits_disk(structs.replace(plain, codec=codec), disk) == (not lacking)
