"""Starting a rollout: of a new release, or back to the release that boards had before.

The command line and the console call these functions; the server that runs on the state folder does the rest. A board
refuses every number that is not above all that it has seen, which protects it from replayed releases. So going back is
a release of its own, with the earlier release's content under a new number, that boards install like any other.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from fedprune.core.errors import ConfigError, ReleaseError, StorageError
from fedprune.core.text import quantity
from fedprune.releases.release import FILES, Release, read_release, sign_manifest
from fedprune.releases.rollout import Fate, Rollout
from fedprune.releases.rollout_plan import CAREFUL_STAGES, RolloutPlan, Stage
from fedprune.wire.fleet_messages import COMMITTED, MAX_RELEASE_NUMBER, STAGED, TRIAL, ReleaseOffer
from fedprune_server.enrollment.pki import IdentityFolder
from fedprune_server.ota.store import RolloutEntry, RolloutStore

_MANUAL_HINT = "Make one of an older release's folder: fedprune-server release --again; then `rollout start` it."


@dataclass(frozen=True)
class RolloutTerms:
    """How careful a rollout is.

    Attributes:
        shares: Shares of the boards, one per stage; empty for one board, a tenth, all.
        success: Share of a stage that must have succeeded before the next stage.
        errors: Share of a stage that may fail.
        board_seconds: After which a board without news has failed.
        stage_seconds: The limit of a stage.
        attempts: Starts of a trial.
        deadline_s: Seconds of each start until it is healthy.
        seed: Draws which boards are early.
    """

    shares: Sequence[float] = ()
    success: float = 0.9
    errors: float = 0.1
    board_seconds: float = 3600.0
    stage_seconds: float = 86_400.0
    attempts: int = 3
    deadline_s: float = 600.0
    seed: int = 0

    def rollout_plan(self, release: Release) -> RolloutPlan:
        shares = self.shares or [s.share for s in CAREFUL_STAGES]
        stages = tuple(Stage(share, self.success, self.errors, self.stage_seconds) for share in shares)
        return RolloutPlan(str(release.number), stages, board_seconds=self.board_seconds, seed=self.seed)


# How boards go back: all at once, because they leave a release that works badly. The shares of successes and failures
# never stop it, and a board that is switched off has a day.
ALL_AT_ONCE = RolloutTerms((1.0,), success=0.01, errors=0.99, board_seconds=86_400.0, stage_seconds=7 * 86_400.0)


@dataclass(frozen=True)
class StartedRollout:
    """A rollout that was started. If it takes boards back, they leave the release `left_release`, and get the content
    of the earlier one `restored_release`."""

    number: int
    release: Release
    rollout: Rollout
    left_release: int | None = None
    restored_release: int | None = None

    def way_back_text(self) -> str:
        boards = quantity(len(self.rollout.boards), "board")
        return (
            f"rollout {self.number}: back from release {self.left_release} to what release {self.restored_release} "
            f"({self.release.version}) holds, as release {self.release.number}, for {boards}"
        )


def start_rollout(
    state: Path,
    folder: Path,
    terms: RolloutTerms,
    devices: Collection[str] | None = None,
    clock: Callable[[], float] = time.time,
    *,
    database: str | None = None,
) -> StartedRollout:
    """Start a rollout to these boards, or to all members, now and later; `database` is a URL, None for the folder's.

    Raises `FedpruneError` if the release is damaged or not this server's, a rollout is under way, or a board is not a
    member.
    """
    with IdentityFolder(state, database=database) as identity:
        release, manifest, signature = read_release(folder, identity.key.verifying_key)
        boards = _selected_boards(devices, sorted(identity.store.members()))
    rollout = Rollout.for_boards(terms.rollout_plan(release), boards)
    # The lock lasts from the check to the new row: two starts at once would delete each other's files.
    with RolloutStore(state, database) as store, store.start_lock():
        store.check_free(release.number, manifest.decode())  # so that no board is downloading what is deleted here
        entries = store.entries()
        before = earlier_rollout(entries, release, boards)
        # Store a release's files for the server, and delete all others but `others`; returns the digests of their leaf
        # tables, in order.
        kept_digests = {f.sha256 for f in release.files} | files_to_keep(entries, before)
        for digest in store.blobs.names():
            if digest not in kept_digests:
                store.blobs.delete(digest)
        leaves = tuple(store.blobs.put((folder / FILES / f.sha256).read_bytes()).leaves for f in release.files)
        offer = ReleaseOffer(
            release.number, manifest.decode(), signature.hex(), leaves, terms.attempts, terms.deadline_s
        )
        prior = None if before is None else before.number
        number = store.begin(offer, rollout, clock(), joins=devices is None, prior=prior)
    return StartedRollout(number, release, rollout)


def request_action(store: RolloutStore, action: str, why: str) -> str:
    """Ask for the rollout that is under way to `pause`, `resume` or `stop`; returns a message. Raises `ConfigError` if
    none is under way, or the action doesn't fit its state."""
    if action == "pause":
        return (
            f"rollout {store.pause(why)} is paused: no further boards get the release; those that are updating finish"
        )
    if action == "resume":
        return f"rollout {store.resume()} continues"
    return f"rollout {store.stop(why)} will stop: boards that have the release keep it"


def _selected_boards(names: Collection[str] | None, members: list[str]) -> list[str]:
    if not members:
        raise ConfigError("no board is a member, or all are revoked", hint="Boards join by `fedprune-server claim`.")
    if names is None:
        return members
    unknown = sorted(set(names) - set(members))
    if unknown or not names:
        raise ConfigError(
            "--devices", expected="names of boards, as `fedprune-server devices` shows them", got=", ".join(unknown)
        )
    return list(names)


def take_back(
    state: Path,
    reason: str,
    *,
    release: int | None = None,
    number: int | None = None,
    above: int = 0,
    terms: RolloutTerms = ALL_AT_ONCE,
    clock: Callable[[], float] = time.time,
    database: str | None = None,
) -> StartedRollout:
    """Start a rollout that takes boards from the release that was rolled out last to the one before.

    The last rollout ends if it is under way. Boards that have its release, or are installing it, go back. Raises
    `ConfigError` if there is no release to go back from or to, no board has it, or another rollout was started since,
    and `ReleaseError` if the earlier release's files are gone, or the number isn't above all that were rolled out.

    Args:
        reason: For the record, and for boards that are installing the release that is left.
        release: The release that must be the last one, so that an order that arrives twice goes back once; None for
            any.
        number: The new release's number; None for the next free one.
        above: A number that releases that were not rolled out yet may have used.
        terms: How careful it is; attempts and their seconds are those of the last rollout.
    """
    with IdentityFolder(state, database=database) as identity:
        key, members = identity.key, identity.store.members()
    with RolloutStore(state, database) as store, store.start_lock():
        entries = store.entries()
        last, before = _last_and_earlier(entries, release)
        boards = sorted(boards_with_release(entries, last.offer.number) & set(members))
        if not boards:
            raise _no_board_error(last.offer.number)
        target = before.release
        # Boards refuse every number that isn't above all that they have seen.
        highest = max(above, *(e.offer.number for e in entries))
        created = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(clock()))
        new_number = highest + 1 if number is None else number
        if not highest < new_number <= MAX_RELEASE_NUMBER:
            limits = f"above {highest}, at most {MAX_RELEASE_NUMBER}"
            raise ReleaseError("number of a release", expected=limits, got=new_number)
        renewed = replace(target, number=new_number, created=created)
        leaves = _leaf_digests(store, target)
        manifest = renewed.to_bytes()
        offer = ReleaseOffer(
            renewed.number,
            manifest.decode(),
            sign_manifest(manifest, key).hex(),
            leaves,
            last.offer.attempts,
            last.offer.seconds,
        )
        rollout = Rollout.for_boards(terms.rollout_plan(renewed), boards)
        begun = store.begin_way_back(offer, rollout, clock(), left_rollout=last.number, why=f"boards go back: {reason}")
    return StartedRollout(begun, renewed, rollout, left_release=last.offer.number, restored_release=target.number)


def _last_and_earlier(entries: list[RolloutEntry], release: int | None) -> tuple[RolloutEntry, RolloutEntry]:
    """The rollout that is left, and the one whose release boards had before."""
    if not entries:
        raise ConfigError("no release has been rolled out yet")
    last = entries[-1]
    number = last.offer.number
    if release is not None and release != number:
        raise ConfigError(f"release {release} isn't the one that was rolled out last", expected=number, got=release)
    if last.left_release is not None:
        text = f"release {number} is itself the way back from release {last.left_release}"
        raise ConfigError(text, hint=_MANUAL_HINT)
    if not boards_with_release(entries, number):
        raise _no_board_error(number)
    before = next((e for e in entries if e.number == last.earlier_rollout), None)
    if before is None:  # the error distinguishes a rehearsal with the same files, which is a common mistake
        files, earlier = last.release.files, (e for e in reversed(entries) if e.offer.number != number)
        twin = next((e.offer.number for e in earlier if e.release.files == files), None)
        if twin is not None:
            raise ConfigError(
                f"release {number} has the same files as release {twin}, so that going back would change nothing",
                hint="To rehearse a way back, roll out a release with another file, such as a newer wheel.",
            )
        raise ConfigError(f"no board of release {number} had one of this server's before", hint=_MANUAL_HINT)
    return last, before


def _no_board_error(release: int) -> ConfigError:
    return ConfigError(f"no board has release {release} or is at it", hint="To end its rollout: `rollout stop`.")


def _leaf_digests(store: RolloutStore, release: Release) -> tuple[str, ...]:
    """Digests of the leaf tables of a release's files, which must all be stored."""
    try:
        digests = []
        for file in release.files:
            store.blobs.read(file.sha256)  # which compares it with its name
            digests.append(store.blobs.ref(file.sha256).leaves)
        return tuple(digests)
    except StorageError as error:
        name = f"release {release.number} ({release.version})"
        raise ReleaseError(f"{name}, which boards had before, is not here any more", hint=_MANUAL_HINT) from error


def earlier_rollout(entries: Sequence[RolloutEntry], release: Release, boards: Collection[str]) -> RolloutEntry | None:
    """The rollout whose release most of these boards have now; None if no board has a release of this server's.

    The release must be for the same Python and processor as `release`, which the boards are to get. A board must have
    reported success with it, and boards must not have been taken back from it. Of two with equally many boards the one
    with the higher number is returned.
    """
    return _most_common_rollout(entries, release, boards, other_than=release)


def boards_with_release(entries: Iterable[RolloutEntry], number: int) -> set[str]:
    """Boards that have a release, or may still install it."""
    boards = set()
    for entry in entries:
        if entry.offer.number != number:
            continue
        for name, board in entry.rollout.boards.items():
            state = entry.reports.get(name, {}).get("state")
            # A board that fell silent, or got the withdrawal too late, may have started the release on trial.
            if board.fate in (Fate.WELL, Fate.GIVEN) or state in (COMMITTED, TRIAL, STAGED):
                boards.add(name)
    return boards


def files_to_keep(entries: Sequence[RolloutEntry], before: RolloutEntry | None) -> set[str]:
    """Digests of the files that boards may be taken back to: of the rollout `before` the next one, and, for other
    boards, of the release that most boards of their Python and processor have.
    """
    all_boards = {name for entry in entries for name in entry.rollout.boards}
    kinds = {(r.python, r.machine): r for r in (e.release for e in entries)}
    sources = [before, *(_most_common_rollout(entries, kind, all_boards) for kind in kinds.values())]
    return {f.sha256 for entry in sources if entry is not None for f in entry.release.files}


def _most_common_rollout(
    entries: Sequence[RolloutEntry], kind: Release, boards: Collection[str], other_than: Release | None = None
) -> RolloutEntry | None:
    left = {entry.left_release for entry in entries}
    entry_of: dict[str, RolloutEntry] = {}
    for entry in entries:
        release = entry.release
        same = other_than is not None and (release.number == other_than.number or release.files == other_than.files)
        if same or release.number in left or (release.python, release.machine) != (kind.python, kind.machine):
            continue
        # In the order of rollouts: a board has the last release with which it reported success.
        entry_of.update({name: entry for name, board in entry.rollout.boards.items() if board.fate is Fate.WELL})
    counts = Counter(entry_of[name].offer.number for name in boards if name in entry_of)
    most_common = max(((n, number) for number, n in counts.items()), default=None)
    return None if most_common is None else next(e for e in reversed(entries) if e.offer.number == most_common[1])
