"""Nothing counts twice: a window over the numbers of one sender's messages to one receiver.

Every message has an epoch and a counter. A sender's epoch is a number that was on its disk before it was first used,
larger than all earlier ones (`fedprune.security.epoch`); within an epoch its counter grows by one per message. A
receiver takes each pair once, in any order as long as a message is not overtaken by 1,024 later ones.

What survives a restart:

- A sender that restarts begins a new epoch. So nothing that it says now has a number that it used before.
- A receiver may write its window (`to_dict`) before it acts on a message, each time; then it goes on where it was.
- Or it writes down the epoch alone, once, before it acts on the first message of it. After a restart it begins with
  `Window.after(epoch)`: every message of that epoch and of earlier ones is refused, those that never came included,
  because it no longer knows which did. The sender therefore begins a new epoch when it learns that the receiver
  restarted: a device at every `hello` of a server, a server at every `birth` of a device; both are said in epochs of
  their own, which are new to the other side. A `StaleEpochError` tells a receiver whose news got lost to say it again.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedprune.core.errors import ReplayError, StaleEpochError, StorageError, shown
from fedprune.core.validation import is_whole
from fedprune.security.envelope import MAX_NUMBER

WINDOW = 1024
"""Later messages by which one may be overtaken and still count."""


class Window:
    """Which numbers of one sender have come.

    Args:
        epoch: The current epoch; none before the first message.
        top: Highest counter that has come in it.
        seen: A bit for each of the `WINDOW` counters up to `top`; the lowest bit is `top` itself.
        closed: Whether the whole epoch is over.
    """

    def __init__(self, epoch: int = -1, top: int = -1, seen: int = 0, *, closed: bool = True) -> None:
        self.epoch = epoch
        self._top = top
        self._seen = seen
        self._closed = closed

    @property
    def top(self) -> int:
        """Highest counter that has come in the current epoch; -1 for none."""
        return self._top

    @classmethod
    def after(cls, epoch: int) -> Window:
        """The window of a receiver that has restarted and knows only the latest epoch: it takes later ones alone."""
        return cls(epoch)

    def check(self, epoch: int, counter: int) -> None:
        """Say whether a message counts, without noting it.

        Raises:
            StaleEpochError: Its epoch is over.
            ReplayError: It has come before, or too many later ones have come first.
        """
        if epoch < self.epoch or (epoch == self.epoch and self._closed):
            raise StaleEpochError(
                "a signed message is of an epoch that is over",
                expected=f"a later one than {self.epoch}" if self._closed else f"{self.epoch} or later",
                got=epoch,
                hint="It is a repetition, or its sender doesn't know yet that this side has restarted.",
            )
        if epoch > self.epoch:
            return
        behind = self._top - counter
        if behind >= WINDOW:
            raise ReplayError(
                "a signed message is too old", expected=f"a number above {self._top - WINDOW}", got=counter
            )
        if behind >= 0 and self._seen >> behind & 1:
            raise ReplayError("a signed message has come before", got=f"number {counter} of epoch {epoch}")

    def accept(self, epoch: int, counter: int) -> bool:
        """Take a message's numbers, once. Only call it for messages whose signature is right.

        Returns:
            Whether an epoch begins with it.

        Raises:
            StaleEpochError: Its epoch is over.
            ReplayError: It has come before, or too many later ones have come first.
        """
        self.check(epoch, counter)
        begins = epoch > self.epoch
        if begins:
            self.epoch, self._top, self._seen, self._closed = epoch, counter, 1, False
        elif counter > self._top:
            ahead = counter - self._top
            # A jump beyond the window leaves nothing of it; shifting by 2^60 bits would leave nothing of the memory.
            self._seen = (self._seen << ahead | 1) & (1 << WINDOW) - 1 if ahead < WINDOW else 1
            self._top = counter
        else:
            self._seen |= 1 << self._top - counter
        return begins

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON that `from_dict` reads."""
        return {"epoch": self.epoch, "top": self._top, "seen": f"{self._seen:x}", "closed": self._closed}

    @classmethod
    def from_dict(cls, body: object) -> Window:
        """A window as it was written.

        Raises:
            StorageError: It is damaged.
        """
        if isinstance(body, Mapping):
            epoch, top, seen, closed = (body.get(k) for k in ("epoch", "top", "seen", "closed"))
            if (
                is_whole(epoch, -1, MAX_NUMBER)
                and is_whole(top, -1, MAX_NUMBER)
                and isinstance(closed, bool)
                and isinstance(seen, str)
            ):
                try:
                    bits = int(seen, 16) if len(seen) <= WINDOW // 4 else -1
                except ValueError:
                    bits = -1
                if 0 <= bits < 1 << WINDOW and (closed or bits & 1):
                    return cls(epoch, top, bits, closed=closed)
        raise StorageError("a window of message numbers is damaged", got=shown(body))
