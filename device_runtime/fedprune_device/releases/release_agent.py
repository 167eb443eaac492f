"""The agent of releases: it downloads, stages and tries those that the server offers, and reports how each ends.

Two things survive a power cut: downloaded files, whose leaves are checked when the download continues, and the
launcher's state. The server repeats at every birth which release it wants.
"""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

from fedprune.core.errors import FedpruneError
from fedprune.core.text import one_line
from fedprune.planning.jetpack_releases import TEGRA_RELEASE
from fedprune.security.device_identity import DeviceIdentity
from fedprune.wire.chunk import Chunk
from fedprune.wire.fleet_messages import (
    COMMITTED,
    DOWNLOADING,
    REFUSED,
    ROLLED_BACK,
    STAGED,
    TRIAL,
    ReleaseOffer,
    ReleaseReport,
    ReleaseWithdrawn,
)
from fedprune.wire.messages import BlobRequest
from fedprune_device.launcher import state as on_disk
from fedprune_device.launcher.slot_store import SlotStore
from fedprune_device.network.connection import BoardConnection
from fedprune_device.releases.installer import JETPACK_PACKAGES, ReleaseInstaller
from fedprune_device.releases.release_download import ReleaseDownload, StagingThread, delete_downloads
from fedprune_device.releases.wheel import DamagedCopyError

_LOG = logging.getLogger("fedprune.device")

_PROGRESS_INTERVAL_S = 10.0  # between two reports of a download
_STATE_POLL_S = 0.5  # between two looks at the state of the trial under way

NO_LAUNCHER = "this board's runtime was not started by a launcher, so that nothing could go back by itself"
NO_IDENTITY = "this board takes part without identity, so that it knows no key that releases are signed with"


def board_installer(
    identity: DeviceIdentity | None, environment: Mapping[str, str] = os.environ
) -> ReleaseInstaller | str:
    """The installer of releases on this board, or the reason without one. The server of `identity` must sign them."""
    root, slot = environment.get("FEDPRUNE_ROOT", ""), environment.get("FEDPRUNE_SLOT", "")
    if not root or not slot:
        return NO_LAUNCHER
    if identity is None:
        return NO_IDENTITY
    keep = JETPACK_PACKAGES if TEGRA_RELEASE.exists() else ()
    return ReleaseInstaller(Path(root), identity.server, keep=keep, running_slot=slot)


class ReleaseAgent:
    """Installs offered releases and reports how each ends. `installer` may be the reason why none can be installed."""

    def __init__(
        self,
        connection: BoardConnection,
        installer: ReleaseInstaller | str,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._connection = connection
        self._installer = installer
        self._clock = clock
        self._offer: ReleaseOffer | None = None
        self._download: ReleaseDownload | None = None
        self._staging: StagingThread | None = None
        self._withdrawn: ReleaseWithdrawn | None = None
        self._trouble = ""  # what went wrong while it is unpacked
        self._is_staged = False  # staged, and waiting for a quiet moment
        self._is_on_trial = False  # this process is the trial
        self._is_leaving = False
        self._last_report: ReleaseReport | None = None
        self._next_progress_at = self._next_poll_at = 0.0

    @property
    def is_idle(self) -> bool:
        """Whether no release is being fetched, unpacked or tried."""
        return self._offer is None and not self._is_on_trial and not self._is_leaving

    def on_birth(self) -> None:
        """After a birth, report the state of releases, and request again what is missing."""
        self._report_errors(self._report_all)

    def on_chunk(self, chunk: Chunk) -> bool:
        download = self._download
        if download is None or not download.wants(chunk.sha256):
            return False
        self._report_errors(lambda: self._send_requests(download.on_chunk(chunk, self._clock())))
        return True

    def on_blob_not_found(self, sha256: str) -> bool:
        if self._download is None or not self._download.wants(sha256):
            return False
        if self._offer is not None:
            _LOG.info("release %d: the server no longer has it", self._offer.number)
            self._forget_offer()
        return True

    def on_message(self, message: ReleaseOffer | ReleaseWithdrawn) -> None:
        if isinstance(message, ReleaseOffer):
            self._report_errors(lambda: self._on_offer(message))
        else:
            self._report_errors(lambda: self._on_withdrawn(message))

    def turn(self, *, quiet: bool) -> bool:
        """Do what is due now; True if the process is to end, so that the launcher begins the trial.

        `quiet`: a restart would cost nothing now.
        """
        self._report_errors(lambda: self._advance(quiet))
        return self._is_leaving

    def _on_offer(self, offer: ReleaseOffer) -> None:
        if self._is_leaving or self._staging is not None:
            return  # a report follows soon, and the server repeats an offer of another release
        self._last_report = None  # a server that repeats an offer has not got the last report
        if isinstance(self._installer, str):
            self._report(offer.number, REFUSED, self._installer)
            return
        state, reason = self._release_state(self._installer, offer.number)
        if installed_manifest(self._installer.home, offer.number) not in (None, _digest(offer.manifest)):
            # Another release has this number on this board: `_start_download` refuses the offer at once.
            state = None
        if state == STAGED:
            self._offer, self._is_staged = offer, True
        if state is not None:
            self._report(offer.number, state, reason)
        elif self._offer == offer:
            self._report_progress()
        elif (disk := self._installer.home.load()) is None or disk.phase != on_disk.TRIAL:
            self._start_download(self._installer, offer)

    def _start_download(self, installer: ReleaseInstaller, offer: ReleaseOffer) -> None:
        self._forget_offer()
        self._offer = offer
        self._download = ReleaseDownload(installer, offer)
        release = self._download.release
        _LOG.info(
            "release %d (%s) is offered: %d bytes, of which %d are installed",
            release.number, release.version, release.size, release.size - self._download.size,
        )  # fmt: skip
        self._send_requests(self._download.start(self._clock()))
        self._report_progress()

    def _on_withdrawn(self, message: ReleaseWithdrawn) -> None:
        if isinstance(self._installer, str) or self._is_leaving:
            return
        if self._offer is not None and self._offer.number == message.number:
            _LOG.info("release %d is withdrawn: %s", message.number, one_line(message.reason))
            if self._staging is not None:
                self._withdrawn = message  # handled when the thread, which reads the files, has ended
                return
            self._forget_offer()
        self._installer.drop(message.number, f"withdrawn: {one_line(message.reason, 200)}")
        if self._download is None and self._staging is None:
            delete_downloads(self._installer)

    def _forget_offer(self) -> None:
        self._offer = self._download = self._staging = self._withdrawn = None
        self._is_staged, self._trouble = False, ""

    def _advance(self, quiet: bool) -> None:
        if isinstance(self._installer, str) or self._is_leaving:
            return
        if self._is_on_trial and self._clock() >= self._next_poll_at:
            self._next_poll_at = self._clock() + _STATE_POLL_S
            self._report_last_release(self._installer)
        if self._download is not None and self._staging is None:
            self._send_requests(self._download.on_tick(self._clock()))
            if self._download.is_done:
                self._staging = StagingThread(self._installer, self._download)
            self._report_progress()
        if self._staging is not None and not self._staging.is_alive:
            error, self._staging, self._download = self._staging.error, None, None
            delete_downloads(self._installer)
            if self._withdrawn is not None:
                self._on_withdrawn(self._withdrawn)
            elif isinstance(error, DamagedCopyError) and self._offer is not None and not self._trouble:
                _LOG.warning("%s: it is fetched", error)
                self._installer.distrust(error.sha256)
                self._start_download(self._installer, self._offer)
            elif error is not None:
                raise error
            elif self._trouble and self._offer is not None:
                self._installer.drop(self._offer.number, self._trouble)
                self._refuse(self._trouble)
            elif self._offer is not None:
                self._is_staged = True
                self._report(self._offer.number, STAGED)
        if self._is_staged and self._offer is not None and quiet:
            self._start_trial(self._installer, self._offer)

    def _start_trial(self, installer: ReleaseInstaller, offer: ReleaseOffer) -> None:
        state = installer.home.load()
        if state is None or state.highest != offer.number or state.phase == on_disk.STABLE:
            self._forget_offer()  # another process of this board was faster
            return
        delete_downloads(installer)  # again, since a power cut may have prevented it after staging
        installer.arm(offer.attempts, offer.seconds)
        _LOG.info("release %d is tried now: the service restarts", offer.number)
        self._report(offer.number, TRIAL)
        self._is_leaving = True

    def _report_errors(self, step: Callable[[], None]) -> None:
        """Report any error with a release to the server; the agent continues."""
        try:
            step()
        except FedpruneError as error:
            self._refuse(str(error))
        except Exception as error:  # noqa: BLE001 - one bad release must not end a device's service
            _LOG.exception("unexpected error with a release; going on")
            self._refuse(f"{type(error).__name__}: {error}")

    def _refuse(self, reason: str) -> None:
        if self._offer is None:
            _LOG.warning("%s", reason)
            return
        if self._staging is not None:  # its thread reads the files that would be deleted: refused when it has ended
            _LOG.warning("%s", reason)
            self._trouble = self._trouble or reason
            return
        number = self._offer.number
        _LOG.warning("release %d is refused: %s", number, reason)
        self._forget_offer()
        self._report(number, REFUSED, reason)
        try:
            if not isinstance(self._installer, str):
                delete_downloads(self._installer)
        except FedpruneError as error:  # it is tried again with the next release
            _LOG.warning("can't delete what was pulled: %s", error)

    def _report_all(self) -> None:
        if isinstance(self._installer, str):
            return
        self._last_report = None
        if self._download is not None:
            if self._staging is None:
                self._send_requests(self._download.start(self._clock()))
            self._report_progress()
        else:
            self._report_last_release(self._installer)

    def _report_last_release(self, installer: ReleaseInstaller) -> None:
        """Report the last release's state from the launcher's state."""
        launcher_state = installer.home.load()
        if launcher_state is None or (launcher_state.phase == on_disk.STABLE and launcher_state.outcome is None):
            self._is_on_trial = False
            return
        is_over = launcher_state.phase == on_disk.STABLE and launcher_state.outcome is not None
        number = launcher_state.outcome.version if is_over and launcher_state.outcome else launcher_state.highest
        state, reason = self._release_state(installer, number)
        self._is_on_trial = state == TRIAL
        if state is not None:
            self._report(number, state, reason)

    def _release_state(self, installer: ReleaseInstaller, number: int) -> tuple[str | None, str]:
        """A release's state and its reason; None if this board doesn't know it. What runs is never rolled back."""
        launcher_state = installer.home.load()
        if launcher_state is None:
            return REFUSED, "the launcher's state is damaged; a restart mends it"
        if launcher_state.phase != on_disk.STABLE and launcher_state.highest == number:
            return {on_disk.STAGED: STAGED, on_disk.TRIAL: TRIAL}[launcher_state.phase], launcher_state.trouble
        with suppress(on_disk.DamagedError):
            if installer.home.record(installer.running_slot).version == number:
                return COMMITTED, ""
        outcome = launcher_state.outcome
        if outcome is not None and (outcome.version, outcome.result) == (number, on_disk.ROLLED_BACK):
            return ROLLED_BACK, outcome.reason
        return None, ""

    def _report_progress(self) -> None:
        if self._download is None or self._offer is None:
            return
        now = self._clock()
        if self._last_report is None or now >= self._next_progress_at:
            self._next_progress_at = now + _PROGRESS_INTERVAL_S
            done, total = self._download.progress
            self._report(self._offer.number, DOWNLOADING, "", done, total)

    def _report(self, number: int, state: str, reason: str = "", done: int = 0, total: int = 0) -> None:
        manifest = None
        if state in (STAGED, TRIAL, COMMITTED, ROLLED_BACK) and not isinstance(self._installer, str):
            manifest = installed_manifest(self._installer.home, number)
        report = ReleaseReport(self._connection.device, number, state, one_line(reason, 1000), done, total, manifest)
        if report != self._last_report:
            self._last_report = report
            self._connection.send(report)

    def _send_requests(self, requests: list[BlobRequest]) -> None:
        for request in requests:
            self._connection.send(request)


def installed_manifest(home: SlotStore, number: int) -> str | None:
    """sha256 of the signed manifest of the release of this number that is in a slot; None without one."""
    for slot in on_disk.SLOTS:
        with suppress(on_disk.DamagedError):
            record = home.record(slot)
            if record.version == number and record.manifest:
                return _digest(record.manifest)
    return None


def _digest(manifest: str) -> str:
    return hashlib.sha256(manifest.encode()).hexdigest()
