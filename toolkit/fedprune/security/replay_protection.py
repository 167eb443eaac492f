"""Replay protection: a window over the numbers of one sender's messages to one receiver.

Every message has an epoch and a counter. A sender's epoch is a number that was on its disk before it was first used,
larger than all earlier ones (`fedprune.security.epoch`); within an epoch its counter grows by one per message. A
receiver accepts each pair once, in any order as long as a message is not overtaken by 1,024 later ones.

- A sender that restarts begins a new epoch, so that it never repeats a number.
- A receiver stores each epoch before it acts on its first message. After a restart it begins with
  `Window.after(epoch)`: every message of that epoch and of earlier ones is rejected, since it no longer knows which
  have come. The sender therefore begins a new epoch when it learns that the receiver restarted: a device at every
  `hello` of a server, a server at every `birth` of a device. Both are sent in epochs of their own, which are new to the
  other side. After a `StaleEpochError` a receiver whose `hello` or `birth` got lost repeats it.
"""

from __future__ import annotations

from fedprune.core.errors import ReplayError, StaleEpochError

WINDOW = 1024
"""Later messages that may overtake one."""


class Window:
    """The numbers of one sender that have come.

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
        """The window of a receiver that has restarted and knows only the latest epoch: it accepts later ones."""
        return cls(epoch)

    def check(self, epoch: int, counter: int) -> None:
        """Check a message's numbers without recording them. Raises `StaleEpochError` if its epoch is over, and
        `ReplayError` if it has come before, or too many later ones have come first."""
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
        """Record the numbers of a message with a valid signature; returns whether an epoch begins with it. Raises as
        `check`."""
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
