"""Encoded updates of a board: what the server reads out of them, and what the board keeps for the next one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hidden_board import DEVICE, HIDDEN, HiddenBoard, hidden_weights

from fedprune import tensorfile
from fedprune.architecture import Axis, Segment
from fedprune.codec import CODECS, Codec, decode, is_packed
from fedprune.element_mask import ElementMask
from fedprune.errors import ConfigError, StorageFullError
from fedprune.ordered_dropout import TensorAxes
from fedprune.recipe import Recipe
from fedprune.selection import Tensors
from fedprune.wire.messages import Offer
from fedprune_device.acceptance import check_offer
from fedprune_device.assignment import Workbench
from fedprune_device.data import LocalData
from fedprune_device.own import Own
from fedprune_device.residual import carried
from fedprune_device.store import DeviceStore

pytestmark = pytest.mark.board

PLAIN = Recipe(epochs=1, batch_size=16)
STATISTICS = {"mean", "var"}
CODED = ("zlib", "float16", "int8", "top-k:0.25")


@pytest.fixture
def board(tmp_path: Path, graphs: Path, data: LocalData) -> HiddenBoard:
    return HiddenBoard(tmp_path / "state", graphs, data)


def carry_out(board: HiddenBoard, offer: Offer) -> tuple[bytes, Tensors, Own | None]:
    """The update's bytes, the tensors that serve, and the newest record of what the board keeps."""
    with DeviceStore(board.root) as store:
        bench = Workbench(DEVICE, store.blobs, store.slots, board.data, shelf=store.own)
        update = bench.carry_out(offer, download_seconds=0.0, report=lambda *_: None, stop=lambda: False)
        raw = store.blobs.read(update.weights.sha256)
        record = store.slots.current()
        assert record is not None
        serves = tensorfile.load(board.root / "serving" / record.slot / "weights.safetensors")
        kept = [Own.from_bytes(r) for r in store.own.read().values()]
    return raw, serves, max(kept, key=lambda own: own.round, default=None)


def read(raw: bytes, text: str, sent: Tensors) -> Tensors:
    codec = Codec.parse(text)
    assert codec is not None
    return decode(codec, raw, sent, set(sent) - STATISTICS)


@pytest.mark.parametrize("text", CODED)
def test_an_update_is_encoded_as_offered_and_what_was_trained_serves(board: HiddenBoard, text: str) -> None:
    sent = hidden_weights(seed=1)
    plain, serves, _ = carry_out(board, board.offer(1, PLAIN, sent, graph="kept"))
    trained = tensorfile.decode(plain)
    raw, serves_coded, own = carry_out(board, board.offer(1, PLAIN, sent, graph="kept", codec=text))
    assert is_packed(raw)
    found = read(raw, text, sent)
    assert set(found) == set(trained)
    for name, value in trained.items():
        assert serves_coded[name].tobytes() == serves[name].tobytes() == value.tobytes()
        left = own.residual.get(name, 0) if own else 0
        assert found[name] + left == pytest.approx(value, abs=1e-6 if own else 1e-3)
        if name in STATISTICS or text == "zlib":
            assert found[name].tobytes() == value.tobytes()
    assert (own is not None) == (text in ("int8", "top-k:0.25"))


def test_what_is_left_out_is_sent_with_the_next_update(board: HiddenBoard) -> None:
    one, two = hidden_weights(seed=1), hidden_weights(seed=2)
    offers = [board.offer(n, PLAIN, w, graph="kept", codec="int8") for n, w in ((1, one), (2, two))]
    _, _, first = carry_out(board, offers[0])
    raw, serves, second = carry_out(board, offers[1])
    assert first is not None
    assert second is not None
    found = read(raw, "int8", two)
    for name in second.residual:
        assert np.abs(first.residual[name]).max() > 0
        assert found[name] + second.residual[name] == pytest.approx(serves[name] + first.residual[name], abs=1e-6)


def test_a_round_that_is_done_twice_gives_the_same_update(board: HiddenBoard) -> None:
    carry_out(board, board.offer(1, PLAIN, hidden_weights(seed=1), graph="kept", codec="top-k:0.25"))
    again = board.offer(2, PLAIN, hidden_weights(seed=2), graph="kept", codec="top-k:0.25")
    assert carry_out(board, again)[0] == carry_out(board, replace(again, attempt=1))[0]


def test_a_masked_update_leaves_out_of_active_elements_alone(board: HiddenBoard) -> None:
    rng = np.random.default_rng(0)
    sent = hidden_weights(seed=1)
    mask = ElementMask({"w1": rng.random(sent["w1"].shape) < 0.5, "w2": rng.random(sent["w2"].shape) < 0.5})
    masked = mask.applied(sent)
    recipe = replace(PLAIN, mask="hard")
    offer = board.offer(1, recipe, masked, graph="masked", mask=mask, codec="int8")
    raw, serves, own = carry_out(board, offer)
    assert own is not None
    found = mask.unpack(read(raw, "int8", mask.pack(masked)))
    for name in set(sent) - STATISTICS:
        assert found[name] + own.residual[name] == pytest.approx(serves[name], abs=1e-6)
    for name, active in mask.active.items():
        assert not own.residual[name][~active].any()


def own(selection: str = "b" * 64, ranking: str | None = "c" * 64, width: int = HIDDEN) -> Own:
    left = {n: v for n, v in hidden_weights(width).items() if n not in STATISTICS}
    return Own("job", 7, "a" * 64, selection, ranking, (width,), 1, residual=left)


def axes() -> TensorAxes:
    hidden = Axis((Segment(0, 0, HIDDEN, 1),))

    def fixed(size: int) -> Axis:
        return Axis((Segment(-1, 0, 1, size),))

    return TensorAxes(
        (HIDDEN,),
        {"w1": (hidden, fixed(6)), "gamma": (hidden,), "beta": (hidden,), "w2": (fixed(3), hidden), "b2": (fixed(3),)},
    )


def offered(board: HiddenBoard, width: int, ranking: str = "c" * 64) -> Offer:
    return board.offer(2, PLAIN, hidden_weights(width), graph="kept", ranking=ranking, codec="int8")


def test_channels_that_both_widths_have_keep_what_was_left_out(board: HiddenBoard) -> None:
    before, half = own(), HIDDEN // 2
    narrow = carried(before, offered(board, half), hidden_weights(half), axes())
    assert set(narrow) == set(before.residual)
    assert narrow["w1"].tobytes() == before.residual["w1"][:half].tobytes()
    assert narrow["w2"].tobytes() == np.ascontiguousarray(before.residual["w2"][:, :half]).tobytes()
    wide = carried(own(width=half), offered(board, HIDDEN), hidden_weights(), axes())
    assert wide["w1"].shape == (HIDDEN, 6)
    assert wide["w1"][:half].tobytes() == own(width=half).residual["w1"].tobytes()
    assert not wide["w1"][half:].any()


def test_of_another_order_of_channels_nothing_is_left(board: HiddenBoard) -> None:
    half = HIDDEN // 2
    assert not carried(own(), offered(board, half, ranking="d" * 64), hidden_weights(half), axes())
    assert not carried(own(ranking=None), offered(board, half), hidden_weights(half), axes())
    assert not carried(own(), offered(board, half), hidden_weights(half), None)
    assert not carried(None, offered(board, half), hidden_weights(half), axes())


def test_a_record_with_what_was_left_out_is_read_back() -> None:
    before = own()
    found = Own.from_bytes(before.to_bytes())
    assert {n: v.tobytes() for n, v in found.residual.items()} == {n: v.tobytes() for n, v in before.residual.items()}
    assert not found.average
    assert not found.personal


def test_an_offer_with_an_unknown_codec_is_refused(board: HiddenBoard) -> None:
    offer = board.offer(1, PLAIN, hidden_weights(), codec="newer")
    with DeviceStore(board.root) as store, pytest.raises(ConfigError, match="offer: codec"):
        check_offer(offer, store, None)


def test_what_is_left_out_needs_room(board: HiddenBoard, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = board.offer(1, PLAIN, hidden_weights())
    with DeviceStore(board.root) as store:
        room = 2 * plain.weights.size
        monkeypatch.setattr(store, "free_bytes", lambda: room)
        check_offer(plain, store, None)
        for text, files in (("float16", 1), ("int8", 3)):
            room = (2 + files) * plain.weights.size - 1
            with pytest.raises(StorageFullError):
                check_offer(replace(plain, codec=text), store, None)
            room += 1
            check_offer(replace(plain, codec=text), store, None)


def test_a_birth_says_which_codecs_are_known() -> None:
    from fedprune_device.greeting import Greeting

    assert Greeting("d", "", None).birth(1, 10, None, 0.0).codecs == CODECS
