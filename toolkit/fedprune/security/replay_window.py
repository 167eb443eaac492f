"""Recognises repeated messages of one sender by their epoch (the number of the sender's start) and counter.

`security.signed_channel` says how a receiver uses it.
"""

from __future__ import annotations

from fedprune.core.errors import ReplayError, StaleEpochError

# Later messages that may overtake one. The window is one integer with a bit for each, 128 bytes per stream.
WINDOW_LENGTH = 1024


class ReplayWindow:
    """The epoch and counters of the messages that have come from one sender, to recognise replays."""

    def __init__(self, epoch: int = -1) -> None:
        self.epoch, self.highest_counter = epoch, -1
        # A bit for each of the `WINDOW_LENGTH` counters up to `highest_counter`; the lowest bit is that one itself.
        self._accepted_bits = 0
        self._is_epoch_over = True  # the whole epoch is over: which of its counters have come is not known

    @classmethod
    def after(cls, epoch: int) -> ReplayWindow:
        """The window of a receiver that has restarted and knows only the latest epoch: it accepts later ones."""
        return cls(epoch)

    def check(self, epoch: int, counter: int) -> None:
        """Check a message's numbers without recording them. Raises `StaleEpochError` if its epoch is over, and
        `ReplayError` if it has come before, or too many later ones have come first."""
        if epoch < self.epoch or (epoch == self.epoch and self._is_epoch_over):
            raise StaleEpochError(
                "a signed message is of an epoch that is over",
                expected=f"a later one than {self.epoch}" if self._is_epoch_over else f"{self.epoch} or later",
                got=epoch,
                hint="It is a repetition, or its sender doesn't know yet that this side has restarted.",
            )
        if epoch > self.epoch:
            return
        behind = self.highest_counter - counter
        if behind >= WINDOW_LENGTH:
            expected = f"a number above {self.highest_counter - WINDOW_LENGTH}"
            raise ReplayError("a signed message is too old", expected=expected, got=counter)
        if behind >= 0 and self._accepted_bits >> behind & 1:
            raise ReplayError("a signed message has come before", got=f"number {counter} of epoch {epoch}")

    def accept(self, epoch: int, counter: int) -> bool:
        """Record the numbers of a message with a valid signature; returns whether an epoch begins with it. Raises as
        `check`."""
        self.check(epoch, counter)
        begins = epoch > self.epoch
        if begins:
            self.epoch, self.highest_counter, self._accepted_bits, self._is_epoch_over = epoch, counter, 1, False
        elif counter > self.highest_counter:
            ahead = counter - self.highest_counter
            # A jump beyond the window leaves nothing of it; shifting by 2^60 bits would leave nothing of the memory.
            accepted_bits = self._accepted_bits << ahead if ahead < WINDOW_LENGTH else 0
            self._accepted_bits = (accepted_bits | 1) & (1 << WINDOW_LENGTH) - 1
            self.highest_counter = counter
        else:
            self._accepted_bits |= 1 << self.highest_counter - counter
        return begins
