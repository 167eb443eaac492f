"""What earlier rollouts say of boards: which release each had before, and who took the one that was rolled out last."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Sequence

from fedprune.releases.release import Release
from fedprune.releases.rollout import Fate
from fedprune.wire.release_messages import COMMITTED, STAGED, TRIAL
from fedprune_server.ota.store import RolloutEntry


def release_of(entry: RolloutEntry) -> Release:
    """A rollout's release.

    Raises:
        ReleaseError: What was kept is none.
    """
    return Release.from_bytes(entry.offer.manifest.encode())


def earlier_rollout(entries: Sequence[RolloutEntry], release: Release, boards: Collection[str]) -> RolloutEntry | None:
    """The rollout whose release most of these boards have before they are given another one.

    Only one for the same Python and processor counts, of which a board said that it does well, and that nobody has
    taken boards back from. Of two that as many boards have it is the one with the higher number.

    Args:
        entries: All rollouts before this one, the oldest first.
        release: The release that they are given.
        boards: Their names.

    Returns:
        None where no board has one: what boards had when they were set up isn't the server's.
    """
    return _usual(entries, release, boards, beside=release)


def boards_with(entries: Iterable[RolloutEntry], number: int) -> set[str]:
    """Boards that have a release, or may come to have it: they do well with it, or are at it.

    Args:
        entries: All rollouts.
        number: The release's.
    """
    boards = set()
    for entry in entries:
        if entry.offer.number != number:
            continue
        for name, board in entry.rollout.boards.items():
            said = entry.reports.get(name, {}).get("state")
            # One that fell silent, or heard of the end too late, may have tried it all the same.
            if board.fate in (Fate.WELL, Fate.GIVEN) or said in (COMMITTED, TRIAL, STAGED):
                boards.add(name)
    return boards


def worth_keeping(entries: Sequence[RolloutEntry], before: RolloutEntry | None) -> set[str]:
    """Digests of the files that boards may be taken back to.

    Args:
        entries: All rollouts, the oldest first.
        before: What boards of the next one have; else of each Python and processor the release of most boards counts.
    """
    everybody = {name for entry in entries for name in entry.rollout.boards}
    kinds = {(r.python, r.machine): r for r in map(release_of, entries)}
    kept = [before, *(_usual(entries, kind, everybody) for kind in kinds.values())]
    return {f.sha256 for entry in kept if entry is not None for f in release_of(entry).files}


def _usual(
    entries: Sequence[RolloutEntry], kind: Release, boards: Collection[str], beside: Release | None = None
) -> RolloutEntry | None:
    left = {entry.leaves for entry in entries}
    had: dict[str, RolloutEntry] = {}
    for entry in entries:
        release = release_of(entry)
        same = beside is not None and (release.number == beside.number or release.files == beside.files)
        if same or release.number in left or (release.python, release.machine) != (kind.python, kind.machine):
            continue
        had.update({name: entry for name, board in entry.rollout.boards.items() if board.fate is Fate.WELL})
    counts = Counter(had[name].offer.number for name in boards if name in had)
    best = max(((n, number) for number, n in counts.items()), default=None)
    return None if best is None else next(e for e in reversed(entries) if e.offer.number == best[1])
