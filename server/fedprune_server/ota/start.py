"""Beginning a rollout of a release: at a terminal or in the console. The server on that folder does the rest."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedprune.core.errors import ConfigError
from fedprune.core.text import quantity
from fedprune.releases.release import FILES, Release, read_release
from fedprune.releases.rollout import CAREFUL, Rollout, RolloutPlan, Stage
from fedprune.wire.release_messages import ReleaseOffer
from fedprune_server.enrollment.pki import IdentityFolder
from fedprune_server.ota.history import earlier_rollout, worth_keeping
from fedprune_server.ota.store import RolloutStore


@dataclass(frozen=True)
class RolloutTerms:
    """How careful a rollout is.

    Attributes:
        shares: Of the boards, one stage each; empty for one board, a tenth, all.
        success: Share of a stage that must do well before the next.
        errors: Share of a stage that may fail.
        board_seconds: That a board may say nothing new.
        stage_seconds: That a stage may take.
        attempts: Starts of a trial.
        deadline_s: Seconds of each until it is healthy.
        seed: Which boards are early.
    """

    shares: Sequence[float] = ()
    success: float = 0.9
    errors: float = 0.1
    board_seconds: float = 3600.0
    stage_seconds: float = 86_400.0
    attempts: int = 3
    deadline_s: float = 600.0
    seed: int = 0

    def plan(self, release: Release) -> RolloutPlan:
        """The plan of a release's rollout.

        Raises:
            ConfigError: These terms are none.
        """
        shares = self.shares or [s.share for s in CAREFUL]
        stages = tuple(Stage(share, self.success, self.errors, self.stage_seconds) for share in shares)
        return RolloutPlan("release", str(release.number), stages, board_seconds=self.board_seconds, seed=self.seed)


@dataclass(frozen=True)
class StartedRollout:
    """A rollout that was begun.

    Attributes:
        number: The rollout's.
        release: What boards are given.
        rollout: To which boards, and when.
        left: Number of the release from which it takes boards back; None for one that goes ahead.
        again: Number of the earlier release that it is made of; None as before.
    """

    number: int
    release: Release
    rollout: Rollout
    left: int | None = None
    again: int | None = None

    def told_back(self) -> str:
        """What it does, of one that takes boards back."""
        boards = quantity(len(self.rollout.boards), "board")
        return (
            f"rollout {self.number}: back from release {self.left} to what release {self.again} "
            f"({self.release.version}) holds, as release {self.release.number}, for {boards}"
        )


def start_rollout(
    state: Path,
    folder: Path,
    terms: RolloutTerms,
    devices: Collection[str] | None = None,
    clock: Callable[[], float] = time.time,
) -> StartedRollout:
    """Begin a rollout.

    Args:
        state: The server's state folder.
        folder: The release's.
        terms: How careful it is.
        devices: The boards; None for all that are let in, now and later.
        clock: Seconds since 1970.

    Raises:
        FedpruneError: The release isn't this server's or is damaged, a rollout is under way, a board isn't let in, or
            the disk fails.
    """
    with IdentityFolder(state) as identity:
        release, manifest, signature = read_release(folder, identity.key.verifying)
        boards = _boards(devices, sorted(identity.store.members()))
    rollout = Rollout.of(terms.plan(release), boards)
    with RolloutStore(state) as store, store.starting():
        store.check_free(release.number, manifest.decode())  # so that nobody pulls what is deleted here
        entries = store.entries()
        before = earlier_rollout(entries, release, boards)
        leaves = _kept(store, folder, release, worth_keeping(entries, before))
        offer = ReleaseOffer(
            release.number, manifest.decode(), signature.hex(), leaves, terms.attempts, terms.deadline_s
        )
        before_it = None if before is None else before.number
        number = store.begin(offer, rollout, clock(), joins=devices is None, prior=before_it)
    return StartedRollout(number, release, rollout)


def _boards(names: Collection[str] | None, members: list[str]) -> list[str]:
    if not members:
        raise ConfigError("no board is let in yet", hint="`fedprune-server claim` lets boards in.")
    if names is None:
        return members
    strange = sorted(set(names) - set(members))
    if strange or not names:
        raise ConfigError(
            "--devices", expected="names of boards, as `fedprune-server devices` shows them", got=", ".join(strange)
        )
    return list(names)


def _kept(store: RolloutStore, folder: Path, release: Release, others: set[str]) -> tuple[str, ...]:
    """Put a release's files where the daemon serves them; the digests of their leaf tables, in the manifest's order.

    What else is there goes, but for these others.
    """
    wanted = {f.sha256 for f in release.files} | others
    for old in store.blobs.names():
        if old not in wanted:
            store.blobs.delete(old)
    return tuple(store.blobs.put((folder / FILES / f.sha256).read_bytes()).leaves for f in release.files)
