"""Random numbers of requests, by which a sender recognises a request that a broker delivers twice."""

from __future__ import annotations

import secrets
from collections import OrderedDict
from typing import TypeVar

from msgspec.structs import replace

from fedprune.wire.messages import BlobRequest, UploadRequest

_MAX_SEEN_REQUESTS = 4096

_Request = TypeVar("_Request", bound="BlobRequest | UploadRequest")


def with_request_number(request: _Request) -> _Request:
    """The request with a random number."""
    # The system's randomness, as for all pauses: a user's program may seed `random` alike on every board and at every
    # start.
    return replace(request, number=secrets.randbits(31))


class SeenRequests:
    """The numbers of the latest requests, to recognise duplicates.

    They are random, because a requester that restarts doesn't know its earlier numbers, and its requests may overtake
    its birth (its announcement after it has connected).
    """

    def __init__(self) -> None:
        self._seen: OrderedDict[tuple[str, int], None] = OrderedDict()

    def is_duplicate(self, device: str, request: BlobRequest | UploadRequest) -> bool:
        """Whether this delivery of a request repeats an earlier one; a request without a number never does."""
        if request.number is None:
            return False
        key = device, request.number
        if key in self._seen:
            return True
        self._seen[key] = None
        if len(self._seen) > _MAX_SEEN_REQUESTS:
            self._seen.popitem(last=False)
        return False
