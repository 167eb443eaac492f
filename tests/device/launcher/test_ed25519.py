"""The launcher's verification of signatures against the library's."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedprune.core.errors import SignatureError
from fedprune.security.keys import SigningKey, VerifyingKey
from fedprune_device.launcher.ed25519 import verify_signature

KEY = SigningKey.make()
ORDER = 2**252 + 27742317777372353535851937790883648493


@given(st.binary(max_size=300), st.integers(0, 511), st.sampled_from(["key", "signature", "data"]))
def test_each_changed_bit_is_found_as_by_the_library(data: bytes, bit: int, where: str) -> None:
    arguments = {"key": KEY.verifying_key.raw, "signature": KEY.sign(data), "data": data}
    assert verify_signature(**arguments)
    raw = bytearray(arguments[where])
    if not raw:
        return
    raw[bit // 8 % len(raw)] ^= 1 << bit % 8
    arguments[where] = bytes(raw)
    try:
        VerifyingKey(arguments["key"]).verify(arguments["signature"], arguments["data"])
        good = True
    except SignatureError:
        good = False
    assert verify_signature(**arguments) is good is False


@pytest.mark.parametrize("length", [0, 31, 63, 65, 128])
def test_keys_and_signatures_of_other_lengths_are_refused(length: int) -> None:
    signature = KEY.sign(b"x")
    assert not verify_signature(KEY.verifying_key.raw, (signature * 2)[:length], b"x")
    assert not verify_signature((KEY.verifying_key.raw * 4)[:length], signature, b"x")


def test_a_signature_has_one_form_only() -> None:
    signature = KEY.sign(b"x")
    scalar = int.from_bytes(signature[32:], "little") + ORDER
    assert not verify_signature(KEY.verifying_key.raw, signature[:32] + scalar.to_bytes(32, "little"), b"x")
    assert not verify_signature(b"\xff" * 32, signature, b"x")
