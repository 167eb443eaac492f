"""An update's upload over HTTPS, in a thread. Any error ends it with one line that names it, and MQTT does it instead.

The bytes are streamed from the store's file. The header `x-amz-checksum-sha256` lets a bucket verify them.
"""

from __future__ import annotations

import base64
import http.client
import logging
import re
import ssl
import time
from collections.abc import Callable

from fedprune.blobs.blob_ref import LEAF_BYTES, BlobRef
from fedprune.blobs.blob_store import BlobStore
from fedprune.wire.transfer import MIN_BYTES_PER_S
from fedprune.wire.urls import UploadUrl
from fedprune_device.network import http_transfer
from fedprune_device.network.http_transfer import HttpTransfer, HttpTransferError

_LOG = logging.getLogger("fedprune.device")

_SUCCESS_STATUSES = (200, 201, 204)
_CODE = re.compile(rb"<Code>([A-Za-z0-9]{1,64})</Code>")  # an object store's reason
_REASON_BYTES = 2048


class HttpUpload(HttpTransfer):
    """Uploads a blob of a store to an address, beginning at once."""

    def __init__(
        self,
        store: BlobStore,
        url: UploadUrl,
        ref: BlobRef,
        context: Callable[[], ssl.SSLContext],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(url, context, clock, http_transfer.STALL_TIMEOUT_S)
        self.url, self.ref = url, ref
        self._store = store
        self._thread.start()

    def _log_end(self) -> None:
        if self.failure:
            _LOG.warning("the update can't be uploaded to %s: %s; it goes over MQTT", self.url, self.failure)
        else:
            _LOG.info("%d bytes of the update were uploaded to %s", self.ref.size, self.url)

    def _transfer(self) -> None:
        checksum = base64.b64encode(bytes.fromhex(self.ref.sha256)).decode()
        with self._pause_stall_clock():
            file = self._store.open(self.ref.sha256)
        with file:
            connection = self._connection
            connection.putrequest("PUT", self.url.target, skip_accept_encoding=True)
            for name, value in (
                ("Content-Length", str(self.ref.size)),
                ("Content-Type", "application/octet-stream"),
                ("x-amz-checksum-sha256", checksum),
                ("User-Agent", "fedprune"),
            ):
                connection.putheader(name, value)
            try:
                connection.endheaders()
                while chunk := file.read(LEAF_BYTES):
                    self._check_stop()
                    connection.send(chunk)
                    self._note_progress(len(chunk) / MIN_BYTES_PER_S)
            except (ConnectionError, ssl.SSLError):
                if connection.sock is None:
                    raise
                self._read_refusal(connection)  # the server may have sent the reason before it hung up
                raise
            self._check_answer(connection.getresponse())

    def _read_refusal(self, connection: http.client.HTTPConnection) -> None:
        try:
            answer = connection.getresponse()
        except (OSError, http.client.HTTPException):
            return
        self._check_answer(answer)

    def _check_answer(self, answer: http.client.HTTPResponse) -> None:
        if answer.status in _SUCCESS_STATUSES:
            return
        code = _CODE.search(answer.read(_REASON_BYTES) if answer.status >= 400 else b"")
        raise HttpTransferError(f"it answers {answer.status}" + (f" ({code[1].decode()})" if code else ""))
