"""Codecs of updates: what they keep, what they give back, and what nobody can make them believe."""

import tracemalloc
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as nst

from fedprune.core import tensorfile
from fedprune.core.errors import ConfigError, ProtocolError
from fedprune.updates import (
    CODECS,
    DOWNLOAD_CODECS,
    Codec,
    agreed_codec,
    decode,
    encode,
    max_update_bytes,
    packing,
    weights,
)
from fedprune.updates.relocation import make_relocation, relocate
from fedprune.updates.update import MIN_SCALED_ROW
from support.nets.drawn_models import architectures, selections

Tensors = dict[str, np.ndarray[Any, Any]]

SHAPES = {"w": (20, 70), "c": (8, 4, 3, 3), "b": (20,), "one": (), "mean": (20,), "none": (0, 3)}
TRAINED = frozenset({"w", "c", "b", "one", "none"})
STEPS = {"int8": 127, "int4": 7}
ALL = ("int8", "int4", "top-k:0.05", "top-k:0.4", "top-k:1.0")


def codec(text: str) -> Codec:
    parsed = Codec.parse(text)
    assert parsed is not None
    return parsed


def tensors(seed: int, scale: float = 1.0) -> Tensors:
    rng = np.random.default_rng(seed)
    return {n: (scale * rng.standard_normal(s)).astype(np.float32) for n, s in SHAPES.items()}


def pair(seed: int, scale: float = 0.01) -> tuple[Tensors, Tensors]:
    """Weights that were sent, and what training made of them."""
    sent = tensors(seed)
    return sent, {
        n: (v + d).astype(np.float32) for (n, v), d in zip(sent.items(), tensors(seed + 1, scale).values(), strict=True)
    }


same_size = st.integers(1, 60).flatmap(
    lambda n: st.tuples(*[nst.arrays(np.float32, n, elements=st.floats(-1e6, 1e6, width=32)) for _ in range(2)])
)


@pytest.mark.parametrize("text", STEPS)
@given(both=same_size)
def test_codes_are_off_by_half_a_step_at_most(text: str, both: tuple[Any, Any]) -> None:
    sent, trained = ({"w": v} for v in both)
    raw, left = encode(codec(text), trained, sent, {"w"})
    step = float(np.abs(trained["w"] - sent["w"]).max()) / STEPS[text]
    assert np.abs(left["w"]).max() <= 0.5 * step * (1 + 1e-5) + 1e-37
    assert np.abs(decode(codec(text), raw, sent, {"w"})["w"] - trained["w"]).max() <= 0.5 * step + 1e-6 * (
        np.abs(both).max() + step
    )


@given(nst.arrays(np.int8, st.integers(1, 50), elements=st.integers(-7, 7)))
def test_two_codes_share_a_byte(codes: Any) -> None:
    packed = packing.to_pairs(codes, 7)
    second = int(codes[1]) if codes.size > 1 else -7
    assert (packed.size, packed[0]) == (-(-codes.size // 2), 15 * (int(codes[0]) + 7) + second + 7)
    assert packing.from_pairs(packed, 7, codes.size, "w").tobytes() == codes.tobytes()


@given(nst.arrays(np.uint8, 3), st.integers(5, 6))
def test_bytes_of_codes_are_refused_or_read_as_what_makes_them(packed: Any, size: int) -> None:
    try:
        codes = packing.from_pairs(packed, 7, size, "w")
    except ProtocolError:
        assert packed.max() >= 15**2 or packed[-1] % 15 ** (6 - size)
        return
    assert packing.to_pairs(codes, 7).tobytes() == packed.tobytes()


@given(nst.arrays(np.float32, 20, elements=st.floats(width=32, allow_nan=False, allow_infinity=False)))
def test_statistics_beside_few_steps_keep_12_bits(mean: Any) -> None:
    sent, trained = pair(5)
    raw, _ = encode(codec("int4"), trained | {"mean": mean}, sent, TRAINED)
    decoded_mean = decode(codec("int4"), raw, sent, TRAINED)["mean"].astype(np.float64)
    assert (np.abs(decoded_mean - mean) <= 2.0**-11 * np.abs(mean.astype(np.float64)) + 2.0**-137).all()
    assert (np.sign(decoded_mean) * np.sign(mean) >= 0).all()  # a variance stays one


def test_long_rows_have_steps_of_their_own() -> None:
    sent = {"w": np.zeros((3, MIN_SCALED_ROW), np.float32), "short": np.zeros((3, MIN_SCALED_ROW - 1), np.float32)}
    trained = {n: v + np.float32([[1e-4], [1.0], [100.0]]) for n, v in sent.items()}
    raw, left = encode(codec("int8"), trained, sent, {*sent})
    assert np.abs(left["w"]).max(axis=1) == pytest.approx([0, 0, 0], abs=1e-5)
    assert (decode(codec("int8"), raw, sent, {*sent})["short"][0] == 0).all()


@given(st.integers(0, 50), st.sampled_from(ALL))
def test_what_arrives_and_what_is_left_are_what_was_trained(seed: int, text: str) -> None:
    sent, trained = pair(seed)
    raw, left = encode(codec(text), trained, sent, TRAINED)
    decoded = decode(codec(text), raw, sent, TRAINED)
    assert {n: v.shape for n, v in decoded.items()} == SHAPES
    assert len(raw) <= max_update_bytes(codec(text), SHAPES, TRAINED)
    for name, value in decoded.items():
        if name not in TRAINED and text == "int4":
            assert value == pytest.approx(trained[name], rel=2.0**-11)
        elif name not in TRAINED:
            assert value.tobytes() == trained[name].tobytes()
        elif value.size:
            assert value + left.get(name, 0) == pytest.approx(trained[name], abs=1e-6)
    assert set(left) == TRAINED - {"none"}


@given(st.integers(0, 20), st.sampled_from(ALL), st.integers(2, 5))
def test_over_rounds_nothing_is_lost(seed: int, text: str, rounds: int) -> None:
    """The sum of what arrived and of what is left at last is the sum of what was trained."""
    total_moves = {n: np.zeros(s, np.float64) for n, s in SHAPES.items() if n in TRAINED}
    arrived = {n: v.copy() for n, v in total_moves.items()}
    left: Tensors = {}
    for number in range(rounds):
        sent, trained = pair(seed + 10 * number)
        raw, left = encode(codec(text), trained, sent, TRAINED, left)
        decoded = decode(codec(text), raw, sent, TRAINED)
        for name in total_moves:
            total_moves[name] += trained[name].astype(np.float64) - sent[name]
            arrived[name] += decoded[name].astype(np.float64) - sent[name]
    for name, value in total_moves.items():
        if value.size:
            assert arrived[name] + left[name] == pytest.approx(value, abs=1e-5)


@given(nst.arrays(np.float32, st.integers(1, 300), elements=st.floats(-9, 9, width=16)), st.floats(0.01, 1))
def test_top_k_keeps_the_largest(values: Any, share: float) -> None:
    count = max(1, int(share * values.size))
    kept_indices = packing.largest_indices(values, count)
    assert len(kept_indices) == count
    assert (np.diff(kept_indices) > 0).all()
    out = np.setdiff1d(np.arange(values.size), kept_indices)
    if out.size:
        smallest_kept = np.abs(values[kept_indices]).min()
        assert np.abs(values[out]).max() <= smallest_kept
        chosen = np.isin(np.flatnonzero(np.abs(values) == smallest_kept), kept_indices)
        assert (np.diff(chosen.astype(int)) <= 0).all()  # of equal ones the first


@given(st.sets(st.integers(0, 5000), min_size=1).map(sorted), st.integers(1, 3000))
def test_indices_come_back_from_either_form(indices: list[int], tail_length: int) -> None:
    index_array, size = np.array(indices, np.int64), indices[-1] + tail_length
    assert packing.from_gaps(packing.to_gaps(index_array), len(index_array), size, "w").tolist() == indices
    assert packing.from_bitmap(packing.to_bitmap(index_array, size), len(index_array), size, "w").tolist() == indices


def test_sorted_bytes_shrink_and_noise_stays_as_it_is() -> None:
    _, trained = pair(1)
    assert len(packing.pack_tensors(trained)) < 0.95 * len(tensorfile.encode(trained))
    noise = {"x": np.frombuffer(np.random.default_rng(0).bytes(2_000_000), np.uint8)}
    raw = packing.pack_tensors(noise)
    assert len(raw) == packing.ENVELOPE_HEADER_BYTES + len(tensorfile.encode(noise))
    assert packing.unpack_tensors(raw, len(raw))["x"].tobytes() == noise["x"].tobytes()


def test_squared_gradients_travel_as_they_are() -> None:
    sent, trained = pair(1)
    squares = {"w::squares": np.square(trained["w"])}
    for text in ALL:
        raw, _ = encode(codec(text), trained | squares, sent, TRAINED)
        assert decode(codec(text), raw, sent, TRAINED)["w::squares"].tobytes() == squares["w::squares"].tobytes()


# -- what nobody can make a server believe -----------------------------------------------------------------------------


def envelope(coded_tensors: Tensors, size: int | None = None, packing_: int = 1) -> bytes:
    """An envelope with whatever is in it."""
    file = tensorfile.encode(coded_tensors)
    size = len(file) if size is None else size
    body = packing.pack_tensors(coded_tensors)[packing.ENVELOPE_HEADER_BYTES :] if packing_ == 1 else file
    return b"FPU\x01" + bytes([packing_, 0, 0, 0]) + size.to_bytes(8, "little") + body


def honest(text: str) -> Tensors:
    sent, trained = pair(1)
    return packing.unpack_tensors(encode(codec(text), trained, sent, TRAINED)[0], 10**6)


HOSTILE: dict[str, tuple[str, Callable[[Tensors], Tensors], str]] = {
    "a scale that is no number": ("int8", lambda p: p | {"b::scales": np.float32([np.nan])}, "scales"),
    "a negative scale": ("top-k:0.05", lambda p: p | {"w::scales": np.float32([-1])}, "scales"),
    "a code out of range": ("int8", lambda p: p | {"b::codes": np.full(20, -128, np.int8)}, "from -127 to 127"),
    "a pair of codes out of range": ("int4", lambda p: p | {"b::codes": np.full(10, 225, np.uint8)}, "from -7 to 7"),
    "a digit behind the last code": ("int4", lambda p: p | {"one::codes": np.uint8([16])}, "1 from -7 to 7"),
    "codes of another shape": ("int8", lambda p: p | {"w::codes": np.zeros((70, 20), np.int8)}, "w::codes"),
    "codes of another type": ("int8", lambda p: p | {"b::codes": np.zeros(20, np.int16)}, "b::codes"),
    "no indices": ("top-k:0.05", lambda p: {n: v for n, v in p.items() if n != "w::gaps"}, "gaps or a bitmap"),
    "indices beyond the end": ("top-k:0.05", lambda p: p | {"w::gaps": np.full(70, 200, np.uint8)}, "below 1400"),
    "a bitmap with too many": ("top-k:0.4", lambda p: p | {"w::bitmap": np.full(175, 255, np.uint8)}, "bitmap of"),
    "a half that is infinite": ("top-k:0.4", lambda p: p | {"b::half": np.full(20, np.inf, np.float16)}, "finite"),
    "another codec's parts": ("top-k:0.4", lambda p: p | {"b::codes": np.zeros(20, np.int8)}, "doesn't have"),
    "statistics of another shape": ("int8", lambda p: p | {"mean": np.zeros(21, np.float32)}, "mean"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_is_wrong_inside_is_one_clear_error(name: str) -> None:
    text, change, message = HOSTILE[name]
    coded_tensors = change(honest(text))
    with pytest.raises(ProtocolError, match=message) as caught:
        decode(codec(text), envelope(coded_tensors), pair(1)[0], TRAINED)
    assert "\n" not in str(caught.value)


def test_a_bomb_is_never_blown_up() -> None:
    sent, _ = pair(1)
    bomb = zlib.compress(bytes(10**9), 9)
    head = b"FPU\x01\x01\0\0\0"
    tracemalloc.start()
    for size in (10**9, 2**63, 5000):
        with pytest.raises(ProtocolError, match="size inside"):
            decode(codec("int8"), head + size.to_bytes(8, "little") + bomb, sent, TRAINED)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 * 10**6 + len(bomb)


def test_damage_of_any_kind_is_an_error_of_ours() -> None:
    sent, trained = pair(1)
    raw, _ = encode(codec("top-k:0.05"), trained, sent, TRAINED)
    wrong = [raw[:8], raw[:16], raw[:-1], raw + b"x", b"", b"FPU\x02" + raw[4:], raw[:5] + b"\x01" + raw[6:]]
    wrong += [envelope(honest("int8"), size=4), envelope({}, size=1), envelope(honest("int8"), packing_=2)]
    for broken in wrong:
        with pytest.raises(ProtocolError):
            decode(codec("top-k:0.05"), broken, sent, TRAINED)


@given(st.integers(0, 10**6), st.binary(min_size=1, max_size=8), st.sampled_from(ALL))
def test_bytes_that_were_changed_are_refused_or_read(at: int, replacement: bytes, text: str) -> None:
    sent, trained = pair(1)
    raw = bytearray(encode(codec(text), trained, sent, TRAINED)[0])
    raw[at % len(raw) : at % len(raw) + len(replacement)] = replacement
    try:
        decoded = decode(codec(text), bytes(raw), sent, TRAINED)
    except ProtocolError:
        return
    assert all(v.shape == SHAPES[n.partition("::")[0]] and v.dtype == np.float32 for n, v in decoded.items())


def test_differences_that_cannot_be_coded_are_an_error_and_no_warning() -> None:
    max_float = np.finfo(np.float32).max
    sent, trained = {"w": np.full(3, -max_float)}, {"w": np.full(3, max_float)}
    for text in ALL:
        with pytest.raises(ProtocolError, match="difference of w"):
            encode(codec(text), trained, sent, {"w"})


# -- weights that devices are sent ------------------------------------------------------------------------------------


@given(st.integers(0, 50), st.sampled_from(DOWNLOAD_CODECS), st.booleans())
def test_weights_are_read_in_the_order_of_their_file(seed: int, text: str, based: bool) -> None:
    base, new = pair(seed)
    receiver_base = base if based else None
    raw = weights.encode(codec(text), new, receiver_base, TRAINED)
    decoded = weights.decode(codec(text), raw, receiver_base, len(tensorfile.encode(new)))
    assert list(decoded) == list(new)
    for name, value in new.items():
        if not based or (name not in TRAINED and text == "int8"):
            exact = value.astype(np.float16).astype(np.float32) if name in TRAINED else value
            assert decoded[name].tobytes() == exact.tobytes()
        assert decoded[name] == pytest.approx(value, abs=5e-3 if based else 1e-2)


@pytest.mark.parametrize(("text", "tolerance"), [("int8", 0.5 * 0.08 / 127), ("int4", 0.5 * 0.08 / 7)])
def test_what_a_codec_leaves_out_of_weights_never_adds_up(text: str, tolerance: float) -> None:
    """However many versions a device gets as differences, it is off by half a step of the last one."""
    receiver_model, new = pair(0)
    for seed in range(20):
        new = {
            n: (v + d).astype(np.float32) for (n, v), d in zip(new.items(), tensors(seed, 0.01).values(), strict=True)
        }
        raw = weights.encode(codec(text), new, receiver_model, TRAINED)
        receiver_model = weights.decode(codec(text), raw, receiver_model, 10**5)
        assert max(np.abs(receiver_model[n] - new[n]).max() for n in ("w", "c", "b")) < tolerance


@given(st.data())
def test_a_relocation_is_what_both_selections_have(data: st.DataObject) -> None:
    architecture = data.draw(architectures())
    before, now = (data.draw(selections(architecture)) for _ in range(2))
    full_model = {
        t.name: np.arange(1, np.prod(t.shape) + 1, dtype=np.float32).reshape(t.shape) for t in architecture.tensors
    }
    relocated_tensors = relocate(before.gather(full_model), make_relocation(before, now), 10**6)
    for name, value in now.gather(full_model).items():
        there = before.coverage_mask(name)[np.ix_(*now.maps(name))] if value.ndim else np.True_
        assert np.array_equal(relocated_tensors[name], np.where(there, value, 0))


@pytest.mark.parametrize(
    "coded_tensors",
    [
        {"w::axes": np.int32([0, -1])},
        {"w::axes": np.int64([0, 0]), "0": np.int32([0])},
        {"w::axes": np.int32([0, -1]), "0": np.int32([20])},
        {"w::axes": np.int32([0, -1]), "0": np.int32([-2])},
        {"w::axes": np.int32([0, 0]), "0": np.zeros(20_000, np.int32)},
    ],
    ids=["no list", "another type", "beyond", "before", "huge"],
)
def test_a_relocation_that_does_not_fit_is_refused(coded_tensors: Tensors) -> None:
    with pytest.raises(ProtocolError, match="relocation"):
        relocate({"w": np.zeros((20, 70), np.float32)}, packing.pack_tensors(coded_tensors), 10**6)


def test_channels_that_were_not_there_are_zero_where_an_axis_had_none() -> None:
    moved = packing.pack_tensors({"w::axes": np.int32([0, 1]), "0": np.int32([-1]), "1": np.int32([2])})

    assert relocate({"w": np.zeros((0, 3), np.float32)}, moved, 10**6)["w"].tolist() == [[0.0]]


# -- what is asked for -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["none", *CODECS, *ALL])
def test_a_setting_is_read_back_as_itself(text: str) -> None:
    parsed = Codec.parse(text)
    assert parsed == Codec.parse("none" if parsed is None else str(parsed))


@pytest.mark.parametrize("text", ["zlib", "int8:0.5", "top-k:nan", None])
def test_another_setting_is_refused(text: object) -> None:
    with pytest.raises(ConfigError, match=r"job\.compression"):
        Codec.parse(text)


def test_a_device_gets_no_codec_that_it_does_not_know() -> None:
    assert agreed_codec("int8", CODECS) == "int8"
    assert agreed_codec("top-k", ["top-k"]) == "top-k:0.05"
    assert agreed_codec("int8", ["int4", "newer"]) is None
    assert agreed_codec("int8", ()) is None
    assert agreed_codec("none", CODECS) is None
