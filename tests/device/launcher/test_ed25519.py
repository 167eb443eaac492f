"""The launcher's verification of signatures against the library's, and against RFC 8032."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedprune.core.errors import SignatureError
from fedprune.security.keys import SigningKey, VerifyingKey
from fedprune_device.launcher.ed25519 import verify

KEY = SigningKey.make()
ORDER = 2**252 + 27742317777372353535851937790883648493

RFC = [
    pytest.param(
        "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a",
        "",
        "e5564300c360ac729086e2cc806e828a84877f1eb8e5d974d873e06522490155"
        "5fb8821590a33bacc61e39701cf9b46bd25bf5f0595bbe24655141438e7a100b",
        id="0 bytes",
    ),
    pytest.param(
        "3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c",
        "72",
        "92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da"
        "085ac1e43e15996e458f3613d0f11d8c387b2eaeb4302aeeb00d291612bb0c00",
        id="1 bytes",
    ),
    pytest.param(
        "fc51cd8e6218a1a38da47ed00230f0580816ed13ba3303ac5deb911548908025",
        "af82",
        "6291d657deec24024827e69c3abe01a30ce548a284743a445e3680d7db5ac3ac"
        "18ff9b538d16f290ae67f760984dc6594a7c15e9716ed28dc027beceea1ec40a",
        id="2 bytes",
    ),
]


@pytest.mark.parametrize(("key", "data", "signature"), RFC)
def test_the_vectors_of_the_rfc(key: str, data: str, signature: str) -> None:
    assert verify(bytes.fromhex(key), bytes.fromhex(signature), bytes.fromhex(data))
    assert not verify(bytes.fromhex(key), bytes.fromhex(signature), bytes.fromhex(data) + b"x")


@given(st.binary(max_size=300), st.integers(0, 511), st.sampled_from(["key", "signature", "data"]))
def test_each_changed_bit_is_found_as_by_the_library(data: bytes, bit: int, where: str) -> None:
    parts = {"key": KEY.verifying.raw, "signature": KEY.sign(data), "data": data}
    assert verify(**parts)
    raw = bytearray(parts[where])
    if not raw:
        return
    raw[bit // 8 % len(raw)] ^= 1 << bit % 8
    parts[where] = bytes(raw)
    try:
        VerifyingKey(parts["key"]).verify(parts["signature"], parts["data"])
        good = True
    except SignatureError:
        good = False
    assert verify(**parts) is good is False


@pytest.mark.parametrize("length", [0, 31, 63, 65, 128])
def test_keys_and_signatures_of_other_lengths_are_refused(length: int) -> None:
    signature = KEY.sign(b"x")
    assert not verify(KEY.verifying.raw, (signature * 2)[:length], b"x")
    assert not verify((KEY.verifying.raw * 4)[:length], signature, b"x")


def test_a_signature_has_one_form_only() -> None:
    signature = KEY.sign(b"x")
    scalar = int.from_bytes(signature[32:], "little") + ORDER
    assert not verify(KEY.verifying.raw, signature[:32] + scalar.to_bytes(32, "little"), b"x")
    assert not verify(b"\xff" * 32, signature, b"x")
