"""An alert, and how the rules that yield alerts register themselves (`alert_rules`)."""

from __future__ import annotations

import re
import shlex
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Annotated

from fedprune.core.records import number_range, word_of
from fedprune.core.text import first_few, sentences
from fedprune_server.monitoring.situation import Situation

CRITICAL, WARNING, INFO = "critical", "warning", "info"
# From the least severe to the most severe: rules, sorting and notifications compare positions in it.
ALERT_LEVELS = (INFO, WARNING, CRITICAL)

# A server's loop that has not turned for this long hangs: no turn of a healthy one takes nearly as long.
HANG_THRESHOLD_S = 60.0

# Alerts of one kind that are open at a time: with a broken broker, 10,000 boards would each be one, in every list.
MAX_ALERTS_OF_KIND = 500

# How many names a text lists at most: nobody reads a line with more.
MAX_NAMES_SHOWN = 5

# How many different reasons one message has for alerts of one kind.
MAX_REASONS_SHOWN = 3

# Part of many texts: the reason why a board fails is often only in its own log.
BOARD_LOG_COMMAND = "journalctl -u fedprune -n 50"

# Where systemd looks for units first, second and so on.
UNIT_FOLDERS = tuple(map(Path, ("/etc/systemd/system", "/usr/local/lib/systemd/system", "/usr/lib/systemd/system")))

# Kinds of alerts that a missing broker explains: `doctor` leaves them out then.
MISSING_BOARD_KINDS = ("no-devices", "too-few-devices")


@dataclass(frozen=True)
class Alert:
    """A problem that an operator has to know of.

    Attributes:
        kind: Its name in the documentation, such as `no-devices`.
        severity: How urgent it is, one of `ALERT_LEVELS`.
        since: When it began, in seconds since 1970.
        what: The problem.
        why: Its consequence.
        todo: What to do about it, with a command where there is one.
        job: The job that it is about; None for the whole server.
        device: The board that it is about; None for no single board.
        subject: The file or server that it is about; empty for none.
        delay_s: How long the cause must last before the alert opens, and be gone before it closes.
    """

    kind: str
    severity: Annotated[str, word_of(ALERT_LEVELS)]
    since: float
    what: str
    why: str
    todo: str
    job: str | None = None
    device: str | None = None
    subject: str = ""
    delay_s: Annotated[float, number_range(0)] = 0.0

    @property
    def key(self) -> str:
        """Kind and subject, which identify the alert whatever its severity."""
        return ":".join(name for name in (self.kind, self.job, self.device or self.subject) if name)

    @property
    def text(self) -> str:
        """The problem and the advice, as sentences."""
        return sentences(self.what, f"To do: {self.todo}")


def fold_alerts(alerts: Iterable[Alert]) -> list[Alert]:
    """One alert for all boards of a kind and severity, as it is delivered: a broker that fails is one message, not one
    for each board. It has the first names, one board for each of the first reasons, and the first board's advice."""
    groups = defaultdict[tuple[str, str], list[Alert]](list)
    for alert in alerts:
        groups[alert.kind if alert.device else alert.key, alert.severity].append(alert)
    return [group[0] if len(group) == 1 else _fold(group) for group in groups.values()]


def _fold(group: Sequence[Alert]) -> Alert:
    names = [alert.device or "" for alert in group]
    # Reasons that differ in a time or a number only are one reason.
    reasons = dict[str, str]()
    for alert in group:
        reasons.setdefault(re.sub(r"\d+", "", alert.what.replace(alert.device or "", "")), alert.what)
    what = f"{len(group)} boards ({first_few(names)}): {first_few(list(reasons.values()), '; ', MAX_REASONS_SHOWN)}"
    return replace(group[0], what=what, since=min(alert.since for alert in group), job=None, device=None)


# A rule yields the alerts that a situation justifies at a time in seconds since 1970. It has no state, so that the
# running server and `doctor` get the same answer.
Rule = Callable[[Situation, float], Iterator[Alert]]

RULES: list[Rule] = []
# The kinds of alerts of all rules, with the severities that each can have: metrics show zeros for those not open.
ALERT_KINDS: dict[str, tuple[str, ...]] = {}
# Kinds of alerts whose rules read counts of the server's present run, which begin at zero after a restart.
COUNTED_KINDS: set[str] = set()


def alert_rule(kind: str, *severities: str, counted: bool = False) -> Callable[[Rule], Rule]:
    """Register a rule that yields alerts of a kind, of these severities; a rule may have several kinds.

    `counted` rules read what a run of the server has counted. Their alerts outlive a restart, until the new run has
    counted as much.
    """

    def register(rule: Rule) -> Rule:
        ALERT_KINDS[kind] = severities
        if counted:
            COUNTED_KINDS.add(kind)
        if rule not in RULES:  # a rule with several kinds is decorated several times
            RULES.append(rule)
        return rule

    return register


def server_command(folder: Path, *words: object, options: Sequence[object] = ()) -> str:
    """A `fedprune-server` command line for a state folder, quoted for a shell; `options` follow the folder."""
    if words == ("run",) and (unit := service_unit(folder.absolute())):
        added = shlex.join(map(str, options))
        change = f"add {added} to its command by `systemctl edit --full {unit}`, then " if added else ""
        return f"{change}systemctl restart {unit}"
    return f"fedprune-server {shlex.join(map(str, (*words, '--state', folder, *options)))}"


@lru_cache(maxsize=64)
def service_unit(folder: Path) -> str:
    """The systemd unit that runs the server of a state folder; empty without one."""
    for path in (path for units in UNIT_FOLDERS for path in sorted(units.glob("*.service"))):
        with suppress(OSError, ValueError):
            for line in path.read_text(encoding="utf-8").replace("\\\n", " ").splitlines():
                words = shlex.split(line.partition("ExecStart=")[2].replace("--state=", "--state "))
                if "run" in words and ("--state", str(folder)) in pairwise(words):
                    return shlex.quote(path.name)
    return ""


def restart_advice(folder: Path, *options: object) -> str:
    """Advice to start a running server again with other options of `fedprune-server run`."""
    stop = "" if service_unit(folder.absolute()) else "stop the server, then "
    return f"{stop}{server_command(folder, 'run', options=options)}"
