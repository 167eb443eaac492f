"""Request ids that separate a repeated blob request, which is answered again, from a duplicate delivery of one."""

from __future__ import annotations

import random
from collections import OrderedDict
from dataclasses import replace

from fedprune.wire.messages import BlobRequest

_REMEMBERED = 4096


def with_request_id(request: BlobRequest) -> BlobRequest:
    """The request with a new random number."""
    return replace(request, number=random.getrandbits(31))  # nosec B311  # no secret


class SeenRequests:
    """The random numbers of the latest blob requests: a sender may forget them, and requests may overtake births."""

    def __init__(self) -> None:
        self._seen: OrderedDict[tuple[str, int], None] = OrderedDict()

    def is_duplicate(self, device: str, request: BlobRequest) -> bool:
        """Whether this very request has come from the device before; one without a number never has."""
        if request.number is None:
            return False
        key = device, request.number
        if key in self._seen:
            return True
        self._seen[key] = None
        if len(self._seen) > _REMEMBERED:
            self._seen.popitem(last=False)
        return False
