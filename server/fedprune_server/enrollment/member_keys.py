"""The members of a fleet and their keys, in a few bytes each: objects of Python's would take 200 per member."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Mapping

_END = b"\0"
"""Ends a name, which has no such character."""


class MemberKeys(Mapping[str, str]):
    """Keys by name, as hexadecimal text. It doesn't change.

    One byte string holds all names and keys, and a hash table with open addressing holds where each begins.

    Raises `ValueError` for a key that isn't hexadecimal, or a name that can't be one.
    """

    def __init__(self, members: Iterable[tuple[str, str]] = ()) -> None:
        entries, self._starts = bytearray(), array("Q", [0])
        for name, key in members:
            if "\0" in name:
                raise ValueError("a member's name")
            entries += name.encode() + _END + bytes.fromhex(key)
            self._starts.append(len(entries))
        self._entries = bytes(entries)
        self._mask = (1 << (2 * len(self) + 1).bit_length()) - 1
        self._slots = array("I", bytes(array("I").itemsize * (self._mask + 1)))
        for number in range(len(self)):
            self._slots[self._slot(self._raw(number))] = number + 1

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __iter__(self) -> Iterator[str]:
        return (self._raw(number)[:-1].decode() for number in range(len(self)))

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self._slots[self._slot(_sought(name))] > 0

    def __getitem__(self, name: str) -> str:
        raw = _sought(name)
        number = self._slots[self._slot(raw)] - 1
        if number < 0:
            raise KeyError(name)
        return self._entries[self._starts[number] + len(raw) : self._starts[number + 1]].hex()

    def lacking(self, other: MemberKeys) -> list[str]:
        """Names of members that `other` doesn't have, or has with another key."""
        found = []
        for number in range(len(self)):
            raw = self._raw(number)
            its = other._slots[other._slot(raw)] - 1
            if its < 0 or self._entry(number) != other._entry(its):
                found.append(raw[:-1].decode())
        return found

    def _slot(self, raw: bytes) -> int:
        """The place of a name in the hash table: its own or, if it isn't there, an empty one."""
        at = hash(raw) & self._mask
        while (number := self._slots[at]) and not self._entries.startswith(raw, self._starts[number - 1]):
            at = (at + 1) & self._mask
        return at

    def _raw(self, number: int) -> bytes:
        start = self._starts[number]
        return self._entries[start : self._entries.index(_END, start) + 1]

    def _entry(self, number: int) -> bytes:
        return self._entries[self._starts[number] : self._starts[number + 1]]


def _sought(name: str) -> bytes:
    """How a name begins its entry. That of surrogates begins none: UTF-8 has none of them."""
    return name.encode(errors="surrogatepass") + _END
