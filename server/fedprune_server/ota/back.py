"""Taking boards back to the release before: that one's content, made anew under a new number, to those who left it.

A board refuses every number that is not above all that it has seen, so that nobody can play an old release to it. So
going back is a release of its own, signed by this server, that boards pull, try and keep, or refuse, like any other.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from fedprune.core.errors import ConfigError, ReleaseError, StorageError
from fedprune.releases.release import Release, signed
from fedprune.releases.rollout import Rollout
from fedprune.wire.release_messages import MAX_NUMBER, ReleaseOffer
from fedprune_server.enrollment.pki import IdentityFolder
from fedprune_server.ota.history import boards_with, release_of
from fedprune_server.ota.start import RolloutTerms, StartedRollout
from fedprune_server.ota.store import RolloutEntry, RolloutStore

ALL_AT_ONCE = RolloutTerms((1.0,), success=0.01, errors=0.99, board_seconds=86_400.0, stage_seconds=7 * 86_400.0)
"""How boards go back: no board's failure keeps another from it, and one that is off has a day."""

_BY_HAND = "Make one of an older release's folder: fedprune-server release --again; then `rollout start` it."


def take_back(
    state: Path,
    reason: str,
    *,
    release: int | None = None,
    number: int | None = None,
    above: int = 0,
    terms: RolloutTerms = ALL_AT_ONCE,
    clock: Callable[[], float] = time.time,
) -> StartedRollout:
    """Begin a rollout that takes boards from the release that was rolled out last to the one before.

    The last rollout ends, if it is under way. To go back belong the boards that have its release or are at it.

    Args:
        state: The server's state folder.
        reason: For the record, and for boards that are at the release that is left.
        release: The release that is to be left, so that an order that comes twice goes back once; None for the last.
        number: Of the new release; None for the next that is free.
        above: A number that others may have used already, in releases that were not rolled out yet.
        terms: How careful it is; attempts and their seconds are those of the last rollout.
        clock: Seconds since 1970.

    Returns:
        The rollout; its release says by its version what boards go back to.

    Raises:
        ConfigError: There is nothing to go back from or to, no board has the release, or another one was begun since.
        ReleaseError: The release before isn't there any more, or the number isn't above all that were rolled out.
        FedpruneError: Without an identity, or the disk fails.
    """
    with IdentityFolder(state) as identity:
        key, members = identity.key, identity.store.members()
    with RolloutStore(state) as store, store.starting():
        entries = store.entries()
        last, before = _ends(entries, release)
        boards = sorted(boards_with(entries, last.offer.number) & set(members))
        if not boards:
            raise ConfigError(
                f"no board has release {last.offer.number} or is at it", hint="To end its rollout: `rollout stop`."
            )
        old = release_of(before)
        highest = max(above, *(e.offer.number for e in entries))
        made = replace(old, number=_number(number, highest), created=_day(clock()))
        leaves = _leaves(store, old)
        manifest = made.to_bytes()
        offer = ReleaseOffer(
            made.number, manifest.decode(), signed(manifest, key).hex(), leaves, last.offer.attempts, last.offer.seconds
        )
        rollout = Rollout.of(terms.plan(made), boards)
        begun = store.begin_back(offer, rollout, clock(), leaves=last.number, why=f"boards go back: {reason}")
    return StartedRollout(begun, made, rollout, left=last.offer.number, again=old.number)


def _ends(entries: list[RolloutEntry], release: int | None) -> tuple[RolloutEntry, RolloutEntry]:
    """The rollout that is left, and the one whose release boards had before."""
    if not entries:
        raise ConfigError("nothing was rolled out yet")
    last = entries[-1]
    number = last.offer.number
    if release is not None and release != number:
        raise ConfigError(f"release {release} isn't the one that was rolled out last", expected=number, got=release)
    if last.leaves is not None:
        raise ConfigError(f"release {number} is itself the way back from release {last.leaves}", hint=_BY_HAND)
    before = next((e for e in entries if e.number == last.prior), None)
    if before is None:
        files = release_of(last).files
        same = next((e.offer.number for e in reversed(entries[:-1]) if release_of(e).files == files), None)
        if same is not None:
            raise ConfigError(
                f"release {number} has the same files as release {same}, so that going back would change nothing",
                hint="To rehearse a way back, roll out a release with another file, such as a newer wheel.",
            )
        raise ConfigError(f"no board of release {number} had one of this server's before", hint=_BY_HAND)
    return last, before


def _number(wanted: int | None, highest: int) -> int:
    number = highest + 1 if wanted is None else wanted
    if not highest < number <= MAX_NUMBER:
        raise ReleaseError("number of a release", expected=f"above {highest}, at most {MAX_NUMBER}", got=number)
    return number


def _leaves(store: RolloutStore, release: Release) -> tuple[str, ...]:
    """Digests of the leaf tables of a release's files, all of which are there and whole."""
    try:
        found = []
        for file in release.files:
            store.blobs.read(file.sha256)  # and compared with its name
            found.append(store.blobs.ref(file.sha256).leaves)
        return tuple(found)
    except StorageError as error:
        name = f"release {release.number} ({release.version})"
        raise ReleaseError(f"{name}, which boards had before, is not here any more", hint=_BY_HAND) from error


def _day(now: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(now))
