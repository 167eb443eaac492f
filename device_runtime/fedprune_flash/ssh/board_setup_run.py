"""One board's course: look at it, copy what is missing, install, give it its claim, see it run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fedprune.core.errors import BoardError, JoinError, KitError, ProfileError
from fedprune.core.text import one_line, quantity
from fedprune.planning.identification import Facts, identify
from fedprune.planning.jetpack import l4t_release
from fedprune_flash.kit.installer_archive import INSTALLER, installer_archive
from fedprune_flash.kit.kit import Kit, Signer, files_for_board
from fedprune_flash.kit.target import PYTHONS
from fedprune_flash.on_board.kit_folder import CLAIM
from fedprune_flash.ssh.claims import Claims
from fedprune_flash.ssh.connection import INSTALL_S, BoardLink
from fedprune_flash.ssh.inventory import BoardRow
from fedprune_flash.ssh.journal import BEGUN, DONE, REMOVED, Journal

_TRIES = 3
_NEEDED = 64 * 2**20
"""Bytes that are free at least after a kit has been copied; the installer looks again, at what it unpacks."""


@dataclass(frozen=True)
class RolloutOrder:
    """What is to be done with every board.

    Attributes:
        kits: Of which each board gets the one that is made for it.
        remove: Undo an installation.
        purge: With it: what was learnt goes, too.
        dry: Only look, and say what would be done.
        wait: Seconds within which a service must run.
        accept_new: Whether the key of a host that was never seen is believed.
        new_claims: Whether boards that have a claim and haven't joined get another.
        signer: The server's key, which signs what each board gets; None to install without signatures.
    """

    kits: tuple[Kit, ...] = ()
    remove: bool = False
    purge: bool = False
    dry: bool = False
    wait: float = 120.0
    accept_new: bool = False
    new_claims: bool = False
    signer: Signer | None = None

    def work(self, row: BoardRow) -> str:
        """A digest of what is done with a board: if it is another, something has changed."""
        signer = None if self.signer is None else self.signer.key.verifying.hex
        body = [asdict(row), sorted(kit.digest for kit in self.kits), self.remove, self.purge, signer]
        return hashlib.sha256(json.dumps(body).encode()).hexdigest()


@dataclass(frozen=True)
class ProgressReport:
    """Who is told how far a board is.

    Attributes:
        say: Of a step, in words.
        copied: Of bytes that are on their way, and of how many there are.
    """

    say: Callable[[str], None]
    copied: Callable[[int, int], None]


@dataclass(frozen=True)
class _File:
    data: bytes | Path
    sha256: str
    size: int


def provision(
    row: BoardRow, link: BoardLink, order: RolloutOrder, claims: Claims, journal: Journal, telling: ProgressReport
) -> str:
    """Do what was ordered with one board.

    Args:
        row: The board.
        link: The connection to it.
        order: What is to be done.
        claims: Where its claim comes from.
        journal: Where it is written down.
        telling: Who is told.

    Returns:
        What was done, in words.

    Raises:
        FedpruneError: It is another board than that of the inventory, or something fails there.
    """
    found = link.ask("probe", free=True)
    _check_access(found)
    if order.remove:
        return _remove(row, link, order, journal, telling)
    profile = _check_model(row, found)
    _check_name(row, found)
    kit = _kit_for(order.kits, found)
    needs = found.get("joined") is not True and (order.new_claims or found.get("claimed") is not True)
    if needs and not claims.there:
        raise JoinError(
            f"{row.device} has not joined yet, and there is no claim for it", hint="Use --claims or --server-state."
        )
    if order.dry:
        return _planned(row, link, order, kit, profile, needs)
    journal.note(row.device, state=BEGUN, work="")
    if not needs or order.new_claims:
        journal.handed(row.device)  # a kill may have come before it was written down
    files = _files(order, kit, row, claims.claim(row.device) if needs else None)
    _copy(link, files, found, telling)
    words = ["--wait", f"{order.wait:g}", *([] if order.signer else ["--unsigned"])]
    code, last = link.install(words, telling.say, INSTALL_S + order.wait)
    after = link.ask("probe")
    if code == 0 or after.get("claimed") is True or after.get("joined") is True:
        journal.handed(row.device)
    if code:
        raise _failed(code, last)
    journal.note(row.device, state=DONE, work=order.work(row))
    return f"{profile}, {kit.target}"


def _check_access(found: Mapping[str, Any]) -> None:
    if found.get("sudo") is not True:
        raise BoardError(
            "its user may not install", expected="sudo without a password", hint="Let it, in /etc/sudoers.d, meanwhile."
        )
    if found.get("wide") is not True:
        raise BoardError("its Python has 32 bits", hint="Put a 64-bit system on it: there is no onnxruntime for less.")


def _check_model(row: BoardRow, found: Mapping[str, Any]) -> str:
    """The board's profile, which must be the one that the inventory names."""
    facts = Facts(
        model=one_line(str(found.get("model", "")), 200),
        compatible=tuple(str(e)[:200] for e in list(found.get("compatible", ()))[:20]),
        l4t=l4t_release(str(found.get("l4t", ""))),
        machine=one_line(str(found.get("machine", "")), 32),
        memory_total=_whole(found.get("memory")) or None,
    )
    try:
        profile = identify(facts).profile.name
    except ProfileError as error:
        raise BoardError(f"no profile fits it: {error.what}", got=error.got) from error
    if profile != row.board:
        raise BoardError(
            f"{row.device} is another board", expected=row.board, got=f"{profile} ({facts.model or facts.machine})",
            hint="Correct its host or its board in the inventory.",
        )  # fmt: skip
    return profile


def _check_name(row: BoardRow, found: Mapping[str, Any]) -> None:
    name = found.get("device")
    if name and name != row.device:
        raise BoardError(
            f"it is installed as another device than {row.device}", got=one_line(str(name), 64),
            hint="Is the host right? To give the board another name, --remove --purge it first.",
        )  # fmt: skip


def _kit_for(kits: Sequence[Kit], found: Mapping[str, Any]) -> Kit:
    version = found.get("python")
    python = f"{version[0]}.{version[1]}" if isinstance(version, list) and len(version) == 2 else ""
    jetson = bool(l4t_release(str(found.get("l4t", ""))))
    machine = one_line(str(found.get("machine", "")), 32)
    for kit in kits:
        target = kit.target
        if (target.python, target.architecture, target.jetson) == (python, machine, jetson):
            return kit
    if python not in PYTHONS:
        raise BoardError(f"there are no kits for Python {python[:10]}", expected=" or ".join(PYTHONS))
    words = f"--python {python} --architecture {machine}{' --jetson' if jetson else ''}"
    raise KitError(
        f"no kit for Python {python} on {machine}{', Jetson' if jetson else ''}",
        got="; ".join(str(kit.target) for kit in kits),
        hint=f"Make one with `fedprune-flash kit {words} ...` and name it with --kit, too.",
    )


def _files(order: RolloutOrder, kit: Kit, row: BoardRow, claim: str | None) -> dict[str, _File]:
    """The kit as this board gets it; the claim is copied last, so that it is no longer there than it must be."""
    told = files_for_board(kit, row.told(kit.board), claim, order.signer)
    files = {f.path: _File(kit.folder / f.path, f.sha256, f.bytes) for f in kit.files if f.path != CLAIM}
    for path, data in sorted(told.items(), key=lambda item: item[0] == CLAIM):
        files[path] = _file(data)
    return files


def _file(data: bytes) -> _File:
    return _File(data, hashlib.sha256(data).hexdigest(), len(data))


def _copy(link: BoardLink, files: Mapping[str, _File], found: Mapping[str, Any], telling: ProgressReport) -> None:
    for _ in range(_TRIES):
        missing = _missing(link, files, dry=False)
        if not missing:
            return
        total = sum(files[path].size - offset for path, offset in missing.items())
        free = _whole(found.get("free"))
        if free < total + _NEEDED:
            raise BoardError(
                "there is no room for the kit", expected=f"{(total + _NEEDED) >> 20} MB", got=f"{free >> 20} MB",
                hint="Free some space there.",
            )  # fmt: skip
        telling.say(f"copying {len(missing)} of {quantity(len(files), 'file')}, {total / 1e6:.1f} MB")
        sent = 0

        def told(count: int, total: int = total) -> None:
            nonlocal sent
            sent += count
            telling.copied(sent, total)

        for path, offset in missing.items():
            link.put(path, files[path].data, files[path].sha256, files[path].size, offset, told)
    raise BoardError(
        "what is copied there comes out as something else", hint="Is its card dying? Or make the kit again."
    )


def _missing(link: BoardLink, files: Mapping[str, _File], *, dry: bool) -> dict[str, int]:
    """How much of each file that is missing is there already, in the order in which they are sent."""
    rows = [[path, f.sha256, f.size] for path, f in files.items()]
    answer = link.ask("have", files=rows, dry=dry, free=dry).get("missing")
    try:
        found = {str(path): int(offset) for path, offset in answer}  # type: ignore[union-attr]
    except (TypeError, ValueError) as error:
        raise BoardError("the board's answer can't be read") from error
    if any(path not in files or not 0 <= offset <= files[path].size for path, offset in found.items()):
        raise BoardError("the board's answer makes no sense")
    return {path: found[path] for path in files if path in found}


def _planned(row: BoardRow, link: BoardLink, order: RolloutOrder, kit: Kit, profile: str, needs: bool) -> str:
    files = _files(order, kit, row, None)
    missing = _missing(link, files, dry=True)
    total = sum(files[path].size - offset for path, offset in missing.items())
    count = f"{quantity(len(missing) + 1, 'file')}, its claim among them" if needs else quantity(len(missing), "file")
    return f"{profile}: copy {count}, {total / 1e6:.1f} MB, run install.pyz, start the service"


def _remove(row: BoardRow, link: BoardLink, order: RolloutOrder, journal: Journal, telling: ProgressReport) -> str:
    words = ["--remove", *(["--purge"] if order.purge else [])]
    if order.dry:
        return f"run install.pyz {' '.join(words)}, delete the kit"
    journal.note(row.device, state=BEGUN, work="")
    telling.say("removing")
    installer = {INSTALLER: _file(installer_archive())}
    _copy(link, installer, {"free": 2**62}, telling)
    code, last = link.install(words, telling.say)
    if code:
        raise _failed(code, last)
    link.ask("drop")
    if order.purge:
        journal.handed(row.device)  # a claim that was on its way stays nobody else's, but isn't kept
    journal.note(row.device, state=REMOVED, work=order.work(row))
    return "all is gone" if order.purge else "what was learnt stays"


def _failed(code: int, last: str) -> BoardError:
    return BoardError(
        f"its installer ended with exit code {code}: {last.removeprefix('error: ')}",
        hint="Resolve it and run the same command again.",
    )


def _whole(value: object) -> int:
    return value if isinstance(value, int) and 0 <= value < 2**63 else 0
