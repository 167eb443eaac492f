"""Renews a board's certificate in time, in a thread, as long as the board runs."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from fedprune.security.device_identity import DeviceIdentity
from fedprune_device.network.enrollment import enrol

_LOG = logging.getLogger("fedprune.device")

_RENEWAL_INTERVAL_S = 600.0  # between two looks at the certificate's end
_DAY_S = 24 * 3600.0
_RENEWAL_TIMEOUT_S = 60.0  # for one renewal; the next look tries again


class Renewal:
    """Requests a new certificate in time, in a thread; the board presents it from its next connection on.

    It is also requested at most once a day while the broker refuses the board, because the clock of a board that was
    switched off may be wrong.
    """

    def __init__(
        self,
        identity: DeviceIdentity,
        urls: Sequence[str],
        is_connected: Callable[[], bool],
        authority: Path | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._identity = identity
        self._urls = urls
        self._is_connected = is_connected
        self._authority = authority
        self._clock = clock
        self._renewed_at = -_DAY_S
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="renewal", daemon=True)

    def __enter__(self) -> Renewal:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._thread.join(10)

    def _run(self) -> None:
        while not self._stopped.wait(_RENEWAL_INTERVAL_S):
            try:
                if self.is_due():
                    self.renew()
            except Exception as error:  # noqa: BLE001, PERF203 - nothing may end what keeps the board a member
                _LOG.warning("no new certificate yet: %s", error)

    def is_due(self) -> bool:
        if self._is_connected():
            return self._identity.needs_renewal()
        return self._clock() - self._renewed_at >= _DAY_S

    def renew(self, patience_s: float = _RENEWAL_TIMEOUT_S) -> None:
        """Request a new certificate; if none comes, an error is raised and the old one stays."""
        enrol(
            self._identity, self._urls, None, self._identity.pin, authority=self._authority,
            patience_s=patience_s, stopped=self._stopped, report=_LOG.debug,
        )  # fmt: skip
        self._renewed_at = self._clock()
        _LOG.info("a new certificate: it counts from the next connection on")
