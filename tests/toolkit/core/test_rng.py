"""Keyed random numbers."""

import subprocess
import sys

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from fedprune.core.rng import keyed_generator

pytestmark = pytest.mark.board

keys = st.lists(st.one_of(st.integers(0, 99), st.text("abc", max_size=3)), max_size=4)


def words(seed: int, key: list[object]) -> list[int]:
    return keyed_generator(seed, *key).integers(0, 2**63, 4).tolist()


@given(st.integers(0, 2**63), keys)
def test_the_same_key_gives_the_same_numbers(seed: int, key: list[object]) -> None:
    assert words(seed, key) == words(seed, key)


@given(st.integers(0, 9), keys, st.integers(0, 9), keys)
def test_different_keys_give_different_numbers(
    seed: int, key: list[object], other_seed: int, other_key: list[object]
) -> None:
    assume([str(k) for k in (seed, *key)] != [str(k) for k in (other_seed, *other_key)])
    assert words(seed, key) != words(other_seed, other_key)


def test_another_process_draws_the_same() -> None:
    code = "from fedprune.core import rng; print(rng.keyed_generator(7, 3, 'pi', 'batches').integers(0, 2**63))"
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert int(out.stdout) == keyed_generator(7, 3, "pi", "batches").integers(0, 2**63)
