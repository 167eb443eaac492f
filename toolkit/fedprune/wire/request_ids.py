"""Numbers of wants: by them one that is said again is told from one that the way has doubled, which nobody answers."""

from __future__ import annotations

import random
from collections import OrderedDict
from dataclasses import replace

from fedprune.wire.messages import BlobRequest

_REMEMBERED = 4096


def with_request_id(want: BlobRequest) -> BlobRequest:
    """The want with a number of its own."""
    return replace(want, number=random.getrandbits(31))  # nosec B311  # tells two wants apart, and hides nothing


class SeenRequests:
    """The last wants that came here.

    A number is drawn and not counted: who asks may forget and begin anew, and wants may overtake births.
    """

    def __init__(self) -> None:
        self._seen: OrderedDict[tuple[str, int], None] = OrderedDict()

    def is_duplicate(self, device: str, want: BlobRequest) -> bool:
        """Whether this very want has come before; one without a number never has.

        Args:
            device: Whose it is.
            want: The want.
        """
        if want.number is None:
            return False
        key = device, want.number
        if key in self._seen:
            return True
        self._seen[key] = None
        if len(self._seen) > _REMEMBERED:
            self._seen.popitem(last=False)
        return False
