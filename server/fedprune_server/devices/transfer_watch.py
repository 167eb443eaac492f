"""Notices that a broker drops the pieces of blobs which a device requests, or which are requested from it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Container

from fedprune.wire.lost_pieces import LostPieces, dropping_broker_message
from fedprune.wire.messages import BlobRequest


class TransferWatch:
    """The transfers under way to and from `admitted` devices: a stranger may use any number of names. Times are in
    seconds of `listening`: pieces that wait in the server are not lost."""

    def __init__(self, admitted: Container[str], listening: Callable[[], float]) -> None:
        self._admitted, self._listening = admitted, listening
        self._lost_downloads = defaultdict[str, LostPieces](LostPieces)
        self._lost_uploads = defaultdict[str, LostPieces](LostPieces)

    def note_download_request(self, device: str, request: BlobRequest) -> None:
        """Note that a device requests pieces of a blob of which none waits to be sent to it."""
        if device in self._admitted:
            self._lost_downloads[device].note_request(request, self._listening())

    def note_upload_request(self, device: str, request: BlobRequest) -> None:
        """Note that pieces of its update are requested from a device."""
        if device in self._admitted:
            self._lost_uploads[device].note_request(request, self._listening())

    def drop_reasons(self) -> dict[str, str]:
        """Texts about devices whose pieces of blobs, sent or requested, seem to be dropped by the broker."""
        reasons = {name: "gets no piece of its model: " + dropping_broker_message("what is sent to it")
                   for name, lost_pieces in self._lost_downloads.items() if lost_pieces.is_stuck}  # fmt: skip
        update_reason = "announces its update, and no piece of it comes: " + dropping_broker_message("what it sends")
        for name, lost_pieces in self._lost_uploads.items():
            if lost_pieces.is_stuck:
                reasons[name] = update_reason
        return reasons

    def note_complete_download(self, device: str) -> None:
        """Note that a device has all that it was offered."""
        self._lost_downloads.pop(device, None)

    def forget(self, device: str) -> None:
        """Forget the requests under way to and from a device: their pieces can no longer be missed."""
        self._lost_uploads.pop(device, None)
        self._lost_downloads.pop(device, None)
