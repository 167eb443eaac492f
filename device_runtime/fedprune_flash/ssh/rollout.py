"""Many boards over SSH at once: what each is doing is shown as it goes, and what became of each at the end."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from fedprune.core.errors import BoardError, ConfigError, FedpruneError, JoinError, KitError, StorageError
from fedprune.terminal.tables import BAD, GOOD, Column, print_table
from fedprune_flash.ssh.board_setup_run import ProgressReport, RolloutOrder, provision
from fedprune_flash.ssh.claims import Claims
from fedprune_flash.ssh.connection import BoardLink
from fedprune_flash.ssh.inventory import BoardRow
from fedprune_flash.ssh.journal import DONE, REMOVED, Journal

_HEAD = ("board", "state", "reason", "what to do")


@dataclass(frozen=True)
class BoardOutcome:
    """What became of a board.

    Attributes:
        row: The board.
        state: In a word or two.
        reason: Why, or what was done.
        remedy: What to do; empty where there is nothing.
        good: Whether it is as it was ordered.
    """

    row: BoardRow
    state: str
    reason: str
    remedy: str = ""
    good: bool = True


class SshRollout:
    """An order that is carried out on many boards.

    Args:
        order: The order.
        claims: Where claims come from.
        journal: Where it is written down how far each board is.
        jobs: How many boards at once.
        again: Look at boards, too, that are done.
    """

    def __init__(
        self, order: RolloutOrder, claims: Claims, journal: Journal, *, jobs: int, again: bool = False
    ) -> None:
        self._order, self._claims, self._journal = order, claims, journal
        self._jobs, self._again = jobs, again
        self._links: set[BoardLink] = set()
        self._guard = threading.Lock()
        self._stopped = False

    def run(self, rows: Sequence[BoardRow]) -> list[BoardOutcome]:
        """Go through all boards; what is done already is passed over.

        Returns:
            What became of each, in their order.

        Raises:
            KeyboardInterrupt: Somebody wanted it to end; connections are broken, and boards that are not done say so
                in the journal.
        """
        with _shown() as told, ThreadPoolExecutor(self._jobs) as pool:
            futures = {pool.submit(self._outcome, row, told(row)): row for row in rows}
            try:
                return self._gathered(futures, rows)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                with self._guard:
                    self._stopped = True
                    for link in self._links:
                        link.kill()
                raise

    def _gathered(self, futures: dict[Future[BoardOutcome], BoardRow], rows: Sequence[BoardRow]) -> list[BoardOutcome]:
        found = {futures[future].device: future.result() for future in as_completed(futures)}
        return [found[row.device] for row in rows]

    def _outcome(self, row: BoardRow, telling: ProgressReport) -> BoardOutcome:
        entry, wanted = self._journal.entry(row.device), REMOVED if self._order.remove else DONE
        if not self._again and (entry.state, entry.work) == (wanted, self._order.work(row)):
            return BoardOutcome(row, wanted, "nothing has changed since")
        telling.say("connecting")
        try:
            done = self._provisioned(row, telling)
            outcome = BoardOutcome(row, "planned" if self._order.dry else wanted, done)
        except FedpruneError as error:
            outcome = BoardOutcome(row, _state(error), _reason(error), error.hint, good=False)
        telling.say(f"{outcome.state}: {outcome.reason}")
        return outcome

    def _provisioned(self, row: BoardRow, telling: ProgressReport) -> str:
        link = BoardLink(row, accept_new=self._order.accept_new)
        try:
            with self._guard:
                if self._stopped:
                    raise BoardError("interrupted")
                self._links.add(link)
            return provision(row, link, self._order, self._claims, self._journal, telling)
        finally:
            with self._guard:
                self._links.discard(link)
            link.close()


def print_outcomes(outcomes: Sequence[BoardOutcome]) -> None:
    """Print what became of the boards: a table on a terminal, lines elsewhere."""
    if not sys.stdout.isatty():
        print(table(outcomes))
        return
    rows = [(str(o.row), (o.state, GOOD if o.good else BAD), o.reason, o.remedy) for o in outcomes]
    print_table([Column(_HEAD[0]), Column(_HEAD[1]), *(Column(title, wrap=20) for title in _HEAD[2:])], rows)


def table(outcomes: Sequence[BoardOutcome]) -> str:
    """What became of the boards, a line each."""
    rows = [_HEAD, *((str(o.row), o.state, o.reason, o.remedy) for o in outcomes)]
    wide = [max(len(row[i]) for row in rows) for i in range(2)]
    # The last two are sentences: a column as wide as the longest of them would be no column.
    lines = [f"{r[0]:<{wide[0]}}  {r[1]:<{wide[1]}}  {r[2]}{' -> ' if r[3] else ''}{r[3]}" for r in rows]
    return "\n".join(line.rstrip() for line in lines)


def _state(error: FedpruneError) -> str:
    if isinstance(error, JoinError):
        return "no claim"
    if isinstance(error, KitError):
        return "no kit"
    if isinstance(error, (ConfigError, StorageError)):
        return "stopped"
    return "failed"


def _reason(error: FedpruneError) -> str:
    parts = [error.what]
    if error.expected is not None:
        parts.append(f"expected {error.expected}")
    if error.got is not None:
        parts.append(f"got {error.got}")
    return " ".join(": ".join([parts[0], ", ".join(parts[1:])]).strip(": ").split())


@contextmanager
def _shown() -> Iterator[Callable[[BoardRow], ProgressReport]]:
    """On a terminal a line for each board that is at work, with a bar; else a line for each step, on stderr."""
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
        ended = text.partition(":")[0] in (DONE, REMOVED, "planned", "no claim", "no kit", "stopped", "failed")
        bars.update(task, step=text[:80], visible=not ended)

    return ProgressReport(say, lambda done, total: bars.update(task, completed=done, total=total))
