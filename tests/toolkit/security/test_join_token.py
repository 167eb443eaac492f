from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedprune.core.errors import JoinError
from fedprune.security.joining import ID, PIN, SECRET, Claim, mac, same
from fedprune.security.keys import transcript

pytestmark = pytest.mark.board

claims = st.builds(
    Claim, st.binary(min_size=ID, max_size=ID), st.binary(min_size=SECRET, max_size=SECRET),
    st.binary(min_size=PIN, max_size=PIN),
)  # fmt: skip
ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZ234567"


@given(claims)
@settings(deadline=None)
def test_a_claim_is_read_back_however_it_is_typed(claim: Claim) -> None:
    assert len(claim.text) == 66
    for typed in (claim.text, claim.text.lower(), claim.text.replace("-", ""), claim.text.replace("-", " ") + "\n"):
        assert Claim.parse(typed) == claim
    assert Claim.parse("FP1" + claim.text[3:].replace("O", "0").replace("B", "8")) == claim


@given(claims, st.data())
@settings(deadline=None)
def test_one_wrong_character_or_two_that_are_swapped_are_noticed(claim: Claim, data: st.DataObject) -> None:
    text = claim.text
    at = data.draw(st.sampled_from([i for i in range(4, len(text)) if text[i] != "-"]))
    other = data.draw(st.sampled_from(ALPHABET.replace(text[at], "")))
    for wrong in (text[:at] + other + text[at + 1 :], text[:at] + text[at + 1 :], text + other):
        with pytest.raises(JoinError, match="the claim is mistyped"):
            Claim.parse(wrong)


@pytest.mark.parametrize(
    "text", ["", "hello", "FP2-AAAA", "FP1", "FP1-", "FP1-" + "1" * 56, "FP1-" + "é" * 56, "A" * 10**6]
)
def test_what_is_no_claim_is_one_clear_error(text: str) -> None:
    with pytest.raises(JoinError, match="claim"):
        Claim.parse(text)


def test_a_claim_keeps_its_secret_where_it_is_logged_and_its_key_is_another_thing() -> None:
    one, two = Claim.make(bytes(PIN)), Claim.make(bytes(PIN))

    assert repr(one.secret) not in repr(one)
    assert one.key not in (one.secret, two.key)
    assert Claim(two.id, one.secret, one.pin).key != one.key
    assert not same(mac(one.key, b"x"), mac(two.key, b"x"))


parts = st.lists(st.none() | st.integers() | st.text(max_size=5) | st.binary(max_size=5), max_size=4)


@given(parts, parts)
def test_two_lists_never_make_the_same_transcript(one: list[object], two: list[object]) -> None:
    exact = [(type(v), v) for v in one] == [(type(v), v) for v in two]
    assert (transcript("a", *one) == transcript("a", *two)) == exact  # type: ignore[arg-type]
    assert transcript("a", *one) != transcript("b", *one)  # type: ignore[arg-type]
