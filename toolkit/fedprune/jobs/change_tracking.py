"""Entries by name that know which of them have changed, and how many there are of each kind.

A fleet has thousands of devices and an event concerns one. Saving a state, or counting its parts, must not go through
all of them each time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, MutableMapping
from typing import Any, ClassVar, Generic, TypeVar

_Self = TypeVar("_Self", bound="TrackedEntry")


class TrackedEntry:
    """Entry of a `TrackedDict`; reports assignments to it.

    Values of attributes are replaced, never changed in place, which would go unnoticed.

    Attributes:
        saved: Hash of the text as which it was saved last; its successor under the same name takes it over.
    """

    __slots__ = ("_kind", "_name", "_roll", "saved")
    __match_args__: ClassVar[tuple[str, ...]]
    _kind: Hashable
    _name: str
    _roll: TrackedDict[Any] | None
    saved: int | None

    def __new__(cls: type[_Self], *_: Any, **__: Any) -> _Self:
        entry = object.__new__(cls)
        object.__setattr__(entry, "_roll", None)
        object.__setattr__(entry, "saved", None)
        return entry

    def note_saved(self, text: str) -> None:
        object.__setattr__(self, "saved", hash(text))

    @property
    def counted_as(self) -> Hashable:
        """The key of the entry."""
        return None

    def references(self) -> set[str]:
        """Digests of the blobs that are kept for it."""
        return set()

    def __setattr__(self, name: str, value: object) -> None:
        if self._roll is None:
            object.__setattr__(self, name, value)
            return
        before = getattr(self, name)
        object.__setattr__(self, name, value)
        if before is not value and (type(before) is not type(value) or before != value):
            self._roll.note(self._name)

    def put_away(self, names: Iterable[str]) -> None:
        """Drop these attributes from memory, except those that are None; they are saved, and the dictionary's `fetch`
        gives them back when one of them is read."""
        for name in names:
            if getattr(self, name) is not None:
                object.__delattr__(self, name)

    def to_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__match_args__}

    def __getstate__(self) -> tuple[None, dict[str, Any]]:
        return None, self.to_dict()  # a copy is on no roll


E = TypeVar("E", bound=TrackedEntry)


class TrackedDict(dict[str, E], Generic[E]):
    """A dictionary of entries by name.

    Args:
        entries: What is on it from the beginning; all of that counts as changed.

    Attributes:
        changed: Names of entries that were put, replaced, changed or taken away since `settle`.
        counts: How many entries are of each kind.
        fetch: Gives the saved attributes of an entry, by its name, that were put away.
    """

    def __init__(self, entries: Mapping[str, E] | Iterable[tuple[str, E]] = ()) -> None:
        super().__init__()
        self.changed: set[str] = set()
        self._watches: list[set[str]] = []
        self.counts = Counter[Any]()
        self.fetch: Callable[[str], Mapping[str, Any]] | None = None
        self.update(entries)

    def count(self, *kinds: Hashable) -> int:
        """How many entries are of any of these kinds."""
        return sum(self.counts[k] for k in kinds)

    def watch(self) -> set[str]:
        """A set of all names, to which the names of later changes are added; its reader removes what it has read."""
        self._watches.append(set(self))
        return self._watches[-1]

    def follow(self, before: TrackedDict[E]) -> None:
        """Take another roll's place: entries of both count as changed, and the other's watches go on here."""
        self.changed |= before.keys() | before.changed
        for names in before._watches:
            names |= before.keys() | self.keys()
        self._watches += before._watches
        self.fetch = self.fetch or before.fetch

    def settle(self) -> None:
        """Forget the recorded changes, which are saved now."""
        self.changed = set()

    def note(self, name: str) -> None:
        """An entry has changed, or has come or gone."""
        for names in (self.changed, *self._watches):
            names.add(name)
        entry = self.get(name)
        if entry is not None and entry.counted_as != entry._kind:
            self._count(entry, -1)
            object.__setattr__(entry, "_kind", entry.counted_as)
            self._count(entry, 1)

    def _count(self, entry: E, more: int) -> None:
        self.counts[entry._kind] += more

    def __setitem__(self, name: str, entry: E) -> None:
        before = self.get(name)
        same = before is not None and before == entry
        if before is not None:
            name = before._name  # the key's own object: a second copy of each name would take as much as the row
            self._count(before, -1)
            object.__setattr__(entry, "saved", before.saved)
        super().__setitem__(name, entry)
        object.__setattr__(entry, "_name", name)
        object.__setattr__(entry, "_roll", self)
        object.__setattr__(entry, "_kind", entry.counted_as)
        self._count(entry, 1)
        if not same:
            self.note(name)

    def __delitem__(self, name: str) -> None:
        entry = self[name]
        object.__setattr__(entry, "_roll", None)
        object.__setattr__(entry, "saved", None)
        self._count(entry, -1)
        super().__delitem__(name)
        self.note(name)

    # Through the two above, which a dictionary's own would pass by.
    update = MutableMapping.update
    setdefault = MutableMapping.setdefault
    popitem = MutableMapping.popitem
    clear = MutableMapping.clear

    def pop(self, name: str, *default: Any) -> Any:
        """Take an entry away, and return it; without it the default, if there is one."""
        if name not in self and default:
            return default[0]
        entry = self[name]
        del self[name]
        return entry

    def __ior__(self, other: Any) -> TrackedDict[E]:  # type: ignore[override,misc]
        self.update(other)
        return self
