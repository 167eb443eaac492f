from contextlib import suppress
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedprune.core.errors import ProtocolError
from fedprune.secure_aggregation.keys import PRIME, SECRET_BYTES, SHARE_BYTES, check_share, join_shares, split_secret

pytestmark = pytest.mark.board

secrets_ = st.binary(min_size=SECRET_BYTES, max_size=SECRET_BYTES)


@given(secrets_, st.integers(2, 12), st.data())
@settings(deadline=None)
def test_any_shares_at_the_threshold_give_the_secret(secret: bytes, holders: int, data: st.DataObject) -> None:
    threshold = data.draw(st.integers(2, holders))
    shares = dict(enumerate(split_secret(secret, holders, threshold), start=1))
    assert all(len(share) == SHARE_BYTES for share in shares.values())
    chosen = data.draw(st.permutations(sorted(shares)))[: data.draw(st.integers(threshold, holders))]
    assert join_shares({x: shares[x] for x in chosen}, threshold) == secret
    with pytest.raises(ProtocolError, match=f"expected {threshold} or more, got {threshold - 1}"):
        join_shares({x: shares[x] for x in chosen[: threshold - 1]}, threshold)


@given(secrets_, secrets_)
@settings(deadline=None)
def test_fewer_shares_fit_every_secret(secret: bytes, false_secret: bytes) -> None:
    """For the shares that are known and any other secret there is a share that gives that one instead."""
    shares = dict(enumerate(split_secret(secret, 4, 3), start=1))
    for known_points in combinations(shares, 2):
        x = next(h for h in shares if h not in known_points)
        # The parabola through (0, false_secret) and both known points, at x.
        points = {0: int.from_bytes(false_secret, "big"), **{h: int.from_bytes(shares[h], "big") for h in known_points}}
        forged = sum(_basis(points, at, x) * y for at, y in points.items()) % PRIME
        assert (
            join_shares({**{h: shares[h] for h in known_points}, x: forged.to_bytes(SHARE_BYTES, "big")}, 3)
            == false_secret
        )


def _basis(points: dict[int, int], at: int, x: int) -> int:
    out = 1
    for abscissa in points:
        if abscissa != at:
            out = out * (x - abscissa) * pow(at - abscissa, -1, PRIME) % PRIME
    return out


def test_the_field_s_prime_is_one() -> None:
    """Miller and Rabin's test; a composite number passes a base with a probability of at most 1/4."""
    odd, twos = PRIME - 1, 0
    while odd % 2 == 0:
        odd, twos = odd // 2, twos + 1
    for base in range(2, 66):
        value = pow(base, odd, PRIME)
        assert value in (1, PRIME - 1) or any(pow(value, 2**i, PRIME) == PRIME - 1 for i in range(twos))


def test_what_is_no_share_is_refused() -> None:
    check_share((PRIME - 1).to_bytes(SHARE_BYTES, "big"))
    with pytest.raises(ProtocolError, match="below the field's prime"):
        check_share(PRIME.to_bytes(SHARE_BYTES, "big"))


def test_a_changed_share_never_gives_the_secret() -> None:
    secret = bytes(range(SECRET_BYTES))
    shares = dict(enumerate(split_secret(secret, 3, 3), start=1))
    changed = (int.from_bytes(shares[2], "big") + 1) % PRIME
    with suppress(ProtocolError):  # raised if it gives a number beyond all secrets
        assert join_shares({**shares, 2: changed.to_bytes(SHARE_BYTES, "big")}, 3) != secret
