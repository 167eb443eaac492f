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
    """Entry of a `TrackedDict`, which it tells of every assignment.

    Values of attributes are replaced, never changed in place: the dictionary would not notice.

    Attributes:
        saved: Hash of the text as which it was saved last, so that an equal text isn't written again. Its successor
            under the same name takes it over.
    """

    __slots__ = ("_kind", "_name", "_owner", "saved")
    __match_args__: ClassVar[tuple[str, ...]]
    _kind: Hashable
    _name: str
    _owner: TrackedDict[Any] | None
    saved: int | None

    def __new__(cls: type[_Self], *_: Any, **__: Any) -> _Self:
        # By `object`: `__setattr__` below needs both attributes, also while a dataclass sets the others.
        entry = object.__new__(cls)
        object.__setattr__(entry, "_owner", None)
        object.__setattr__(entry, "saved", None)
        return entry

    def note_saved(self, text: str) -> None:
        object.__setattr__(self, "saved", hash(text))

    @property
    def count_kind(self) -> Hashable:
        """The kind under which the dictionary counts the entry."""
        return None

    def references(self) -> set[str]:
        """Digests of the blobs that are kept for it."""
        return set()

    def __setattr__(self, name: str, value: object) -> None:
        if self._owner is None:
            object.__setattr__(self, name, value)
            return
        former = getattr(self, name)
        object.__setattr__(self, name, value)
        if former is not value and (type(former) is not type(value) or former != value):
            self._owner.record_change(self._name)

    def evict(self, names: Iterable[str]) -> None:
        """Drop these attributes from memory, except those that are None; they are saved, and the dictionary's `fetch`
        gives them back when one of them is read."""
        for name in names:
            if getattr(self, name) is not None:
                # `__getattr__` of the class fetches what is missing.
                object.__delattr__(self, name)

    def to_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__match_args__}

    def __getstate__(self) -> tuple[None, dict[str, Any]]:
        return None, self.to_dict()  # a copy belongs to no dictionary


E = TypeVar("E", bound=TrackedEntry)


class TrackedDict(dict[str, E], Generic[E]):
    """A dictionary of entries by name.

    Args:
        entries: Its first entries; all of them count as changed.

    Attributes:
        changed: Names of entries that were put, replaced, changed or taken away since `mark_saved`.
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

    def take_over(self, former: TrackedDict[E]) -> None:
        """Take another dictionary's place: entries of both count as changed, and the other's watches continue here."""
        self.changed |= former.keys() | former.changed
        for names in former._watches:
            names |= former.keys() | self.keys()
        self._watches += former._watches
        self.fetch = self.fetch or former.fetch

    def mark_saved(self) -> None:
        """Forget the recorded changes, which are saved now."""
        self.changed = set()

    def record_change(self, name: str) -> None:
        """Record that an entry has changed, or was added or removed."""
        for names in (self.changed, *self._watches):
            names.add(name)
        entry = self.get(name)
        if entry is not None and entry.count_kind != entry._kind:
            self._add_to_count(entry, -1)
            object.__setattr__(entry, "_kind", entry.count_kind)
            self._add_to_count(entry, 1)

    def _add_to_count(self, entry: E, change: int) -> None:
        self.counts[entry._kind] += change

    def __setitem__(self, name: str, entry: E) -> None:
        former = self.get(name)
        is_equal = former is not None and former == entry
        if former is not None:
            name = former._name  # the key's own object: a second copy of each name would take as much as the row
            self._add_to_count(former, -1)
            object.__setattr__(entry, "saved", former.saved)
        super().__setitem__(name, entry)
        object.__setattr__(entry, "_name", name)
        object.__setattr__(entry, "_owner", self)
        object.__setattr__(entry, "_kind", entry.count_kind)
        self._add_to_count(entry, 1)
        if not is_equal:
            self.record_change(name)

    def __delitem__(self, name: str) -> None:
        entry = self[name]
        object.__setattr__(entry, "_owner", None)
        object.__setattr__(entry, "saved", None)
        self._add_to_count(entry, -1)
        super().__delitem__(name)
        self.record_change(name)

    # By the two methods above: a dictionary's own methods would bypass them.
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

    def __ior__(self, entries: Any) -> TrackedDict[E]:  # type: ignore[override,misc]
        self.update(entries)
        return self
