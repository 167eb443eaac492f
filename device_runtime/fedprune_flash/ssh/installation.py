"""Many boards over SSH at once: what each is given, how far each is, and what became of each."""

from __future__ import annotations

import hashlib
import json
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from fedprune.core.errors import BoardError, ConfigError, FedpruneError, JoinError, KitError, ProfileError, StorageError
from fedprune.core.text import one_line, quantity
from fedprune.output.tables import BAD, GOOD, Column, print_table
from fedprune.planning.identification import Facts, identify, l4t_release
from fedprune_flash.kit.kit import INSTALLER, Kit, Signer, files_for_board, installer_archive
from fedprune_flash.kit.target import PYTHONS
from fedprune_flash.on_board.kit_folder import CLAIM
from fedprune_flash.ssh.connection import INSTALL_S, BoardLink
from fedprune_flash.ssh.inventory import BoardRow
from fedprune_flash.ssh.journal import BEGUN, DONE, REMOVED, Claims, Journal

_PLANNED = "planned"
_TRIES = 3
_SPARE = 64 * 2**20  # bytes that must stay free after a kit has been copied; the installer checks again what it unpacks


@dataclass(frozen=True)
class InstallationOrder:
    """The order for every board.

    Each board gets the kit of its kind. `remove` undoes an installation, `purge` deletes the board's state, too; `dry`
    changes nothing. Within `wait` seconds the service must run. `accept_new` accepts the key of an unknown host;
    `new_claims` gives another claim to boards that have one and haven't joined. `signer` signs each board's settings;
    None to install without signatures.
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
        """A digest of what is done with a board; a board whose digest in the journal differs is done again."""
        signer = None if self.signer is None else self.signer.key.verifying.hex
        body = [asdict(row), sorted(kit.digest for kit in self.kits), self.remove, self.purge, signer]
        return hashlib.sha256(json.dumps(body).encode()).hexdigest()


@dataclass(frozen=True)
class BoardOutcome:
    """The outcome at a board: its state in a word or two, the reason, what to do, and whether it is as ordered."""

    row: BoardRow
    state: str
    reason: str
    remedy: str = ""
    good: bool = True


class ProgressReport(NamedTuple):
    """Takes a board's steps as text, and bytes copied with bytes in all."""

    say: Callable[[str], None]
    copied: Callable[[int, int], None]


class _Content(NamedTuple):
    data: bytes | Path
    sha256: str
    size: int

    @classmethod
    def of(cls, data: bytes) -> _Content:
        return cls(data, hashlib.sha256(data).hexdigest(), len(data))


class SshInstallation:
    """Carries an order out on many boards, `jobs` at once; `again` includes boards that are done."""

    def __init__(
        self, order: InstallationOrder, claims: Claims, journal: Journal, *, jobs: int, again: bool = False
    ) -> None:
        self._order, self._claims, self._journal = order, claims, journal
        self._jobs, self._again = jobs, again
        self._links: set[BoardLink] = set()
        self._guard = threading.Lock()
        self._stopped = False

    def run(self, rows: Sequence[BoardRow]) -> list[BoardOutcome]:
        """Visit all boards that are not done; returns one outcome per row, in their order.

        When interrupted, connections are closed, and the journal shows what is not done.
        """
        with _shown() as report_for, ThreadPoolExecutor(self._jobs) as pool:
            futures = {pool.submit(self._outcome, row, report_for(row)): row.device for row in rows}
            try:
                found = {futures[future]: future.result() for future in as_completed(futures)}
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                with self._guard:
                    self._stopped = True
                    for link in self._links:
                        link.kill()
                raise
        return [found[row.device] for row in rows]

    def _outcome(self, row: BoardRow, report: ProgressReport) -> BoardOutcome:
        order, entry = self._order, self._journal.entry(row.device)
        wanted = REMOVED if order.remove else DONE
        if not self._again and (entry.state, entry.work) == (wanted, order.work(row)):
            return BoardOutcome(row, wanted, "nothing has changed since")
        report.say("connecting")
        try:
            done = self._connected(row, report)
            outcome = BoardOutcome(row, _PLANNED if order.dry else wanted, done)
        except FedpruneError as error:
            outcome = BoardOutcome(row, _state(error), _reason(error), error.hint, good=False)
        report.say(f"{outcome.state}: {outcome.reason}")
        return outcome

    def _connected(self, row: BoardRow, report: ProgressReport) -> str:
        link = BoardLink(row, accept_new=self._order.accept_new)
        try:
            with self._guard:
                if self._stopped:
                    raise BoardError("interrupted")
                self._links.add(link)
            return _Visit(row, link, self._order, self._claims, self._journal, report).run()
        finally:
            with self._guard:
                self._links.discard(link)
            link.close()


@dataclass(frozen=True)
class _Visit:
    """One board over an open connection: probe it, copy what is missing, install, and see the service run."""

    row: BoardRow
    link: BoardLink
    order: InstallationOrder
    claims: Claims
    journal: Journal
    report: ProgressReport

    def run(self) -> str:
        row, order = self.row, self.order
        found = self.link.ask("probe", free=True)
        _check_access(found)
        if order.remove:
            return self._remove()
        profile = _check_model(row, found)
        _check_name(row, found)
        kit = _kit_for(order.kits, found)
        needs = found.get("joined") is not True and (order.new_claims or found.get("claimed") is not True)
        if needs and not self.claims.there:
            raise JoinError(
                f"{row.device} has not joined yet, and there is no claim for it", hint="Use --claims or --server-state."
            )
        if order.dry:
            return self._planned(kit, profile, needs)
        self.journal.note(row.device, state=BEGUN, work="")
        if not needs or order.new_claims:
            self.journal.handed(row.device)  # a run that was killed may not have recorded it
        self._copy(self._files(kit, self.claims.claim(row.device) if needs else None), found)
        words = ["--wait", f"{order.wait:g}", *([] if order.signer else ["--unsigned"])]
        code, last = self.link.install(words, self.report.say, INSTALL_S + order.wait)
        after = self.link.ask("probe")
        if code == 0 or after.get("claimed") is True or after.get("joined") is True:
            self.journal.handed(row.device)
        _check_installer(code, last)
        self.journal.note(row.device, state=DONE, work=order.work(row))
        return f"{profile}, {kit.target}"

    def _remove(self) -> str:
        order, device = self.order, self.row.device
        words = ["--remove", *(["--purge"] if order.purge else [])]
        if order.dry:
            return f"run install.pyz {' '.join(words)}, delete the kit"
        self.journal.note(device, state=BEGUN, work="")
        self.report.say("removing")
        self._copy({INSTALLER: _Content.of(installer_archive())}, {"free": 2**62})
        _check_installer(*self.link.install(words, self.report.say))
        self.link.ask("drop")
        if order.purge:
            self.journal.handed(device)  # its claim is given to no other board, but isn't kept
        self.journal.note(device, state=REMOVED, work=order.work(self.row))
        return "all is gone" if order.purge else "what was learnt stays"

    def _files(self, kit: Kit, claim: str | None) -> dict[str, _Content]:
        """The kit as this board gets it. The claim is copied last, so that it is there no longer than it must be."""
        own = files_for_board(kit, self.row.told(kit.board), claim, self.order.signer)
        files = {f.path: _Content(kit.folder / f.path, f.sha256, f.bytes) for f in kit.files if f.path != CLAIM}
        for path, data in sorted(own.items(), key=lambda item: item[0] == CLAIM):
            files[path] = _Content.of(data)
        return files

    def _copy(self, files: Mapping[str, _Content], found: Mapping[str, Any]) -> None:
        for _ in range(_TRIES):
            missing = self._missing(files, dry=False)
            if not missing:
                return
            total = sum(files[path].size - offset for path, offset in missing.items())
            free = _whole(found.get("free"))
            if free < total + _SPARE:
                raise BoardError(
                    "there is no room for the kit", expected=f"{(total + _SPARE) >> 20} MB", got=f"{free >> 20} MB",
                    hint="Free some space there.",
                )  # fmt: skip
            self.report.say(f"copying {len(missing)} of {quantity(len(files), 'file')}, {total / 1e6:.1f} MB")
            sent = 0

            def told(count: int, total: int = total) -> None:
                nonlocal sent
                sent += count
                self.report.copied(sent, total)

            for path, offset in missing.items():
                self.link.put(path, *files[path], offset, told)
        raise BoardError(
            "copied files arrive damaged", hint="Its card may be failing, or a file of the kit has changed."
        )

    def _missing(self, files: Mapping[str, _Content], *, dry: bool) -> dict[str, int]:
        """Bytes that are there already of each file that is missing, in the order in which files are sent."""
        rows = [[path, f.sha256, f.size] for path, f in files.items()]
        answer = self.link.ask("have", files=rows, dry=dry, free=dry).get("missing")
        try:
            found = {str(path): int(offset) for path, offset in answer}  # type: ignore[union-attr]
        except (TypeError, ValueError) as error:
            raise BoardError("the board's answer can't be read") from error
        if any(path not in files or not 0 <= offset <= files[path].size for path, offset in found.items()):
            raise BoardError("the board's answer makes no sense")
        return {path: found[path] for path in files if path in found}

    def _planned(self, kit: Kit, profile: str, needs: bool) -> str:
        files = self._files(kit, None)
        missing = self._missing(files, dry=True)
        total = sum(files[path].size - offset for path, offset in missing.items())
        count = quantity(len(missing) + needs, "file") + (", its claim among them" if needs else "")
        return f"{profile}: copy {count}, {total / 1e6:.1f} MB, run install.pyz, start the service"


def _check_access(found: Mapping[str, Any]) -> None:
    if found.get("sudo") is not True:
        raise BoardError(
            "its user may not install",
            expected="sudo without a password",
            hint="Allow it in /etc/sudoers.d for the installation.",
        )
    if found.get("wide") is not True:
        raise BoardError("its Python has 32 bits", hint="Put a 64-bit system on it: onnxruntime needs one.")


def _check_model(row: BoardRow, found: Mapping[str, Any]) -> str:
    """The name of the board's profile, which must be the one in the inventory."""
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


def _check_installer(code: int, last: str) -> None:
    if code:
        raise BoardError(
            f"its installer ended with exit code {code}: {last.removeprefix('error: ')}",
            hint="Resolve it and run the same command again.",
        )


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


def _whole(value: object) -> int:
    return value if isinstance(value, int) and 0 <= value < 2**63 else 0


def print_outcomes(outcomes: Sequence[BoardOutcome]) -> None:
    rows = [(str(o.row), (o.state, GOOD if o.good else BAD), o.reason, o.remedy) for o in outcomes]
    print_table([Column("board"), Column("state"), Column("reason", wrap=20), Column("what to do", wrap=20)], rows)


_FAILURES = {JoinError: "no claim", KitError: "no kit", ConfigError: "stopped", StorageError: "stopped"}


def _state(error: FedpruneError) -> str:
    return next((state for kind, state in _FAILURES.items() if isinstance(error, kind)), "failed")


def _reason(error: FedpruneError) -> str:
    return " ".join(str(error).removesuffix(f". {error.hint}").split())


@contextmanager
def _shown() -> Iterator[Callable[[BoardRow], ProgressReport]]:
    """On a terminal a bar for each board that is at work; else a line for each step, on stderr."""
    if not sys.stderr.isatty():
        yield _line
        return
    columns = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[step]}", markup=False)
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        yield lambda row: _bar(bars, row)


def _line(row: BoardRow) -> ProgressReport:
    return ProgressReport(lambda text: print(f"{row.device}: {text}", file=sys.stderr, flush=True), lambda *_: None)


def _bar(bars: Progress, row: BoardRow) -> ProgressReport:
    task: TaskID = bars.add_task(row.device, total=1, step="", visible=False)

    def say(text: str) -> None:
        ended = text.partition(":")[0] in (DONE, REMOVED, _PLANNED, "failed", *_FAILURES.values())
        bars.update(task, step=text[:80], visible=not ended)

    return ProgressReport(say, lambda done, total: bars.update(task, completed=done, total=total))
