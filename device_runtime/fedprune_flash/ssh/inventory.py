"""The inventory of boards that are installed over SSH: a TOML file, checked as a whole before it is used.

[defaults]                       of all boards
user = "ann"

[[board]]
device = "attic"
host = "attic.local"
board = "raspberry-pi-5"
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from fedprune.core.errors import ConfigError, ProfileError, shown
from fedprune.core.toml_file import read_toml_text
from fedprune.core.toml_positions import key_places
from fedprune.core.validation import matching, only, whole
from fedprune.planning import profile_store
from fedprune.wire.topics import check_device
from fedprune_flash.kit.board_settings import BoardSettings

MAX_BOARDS = 1000

_HOST = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9._-]{0,252}[A-Za-z0-9])?|[0-9A-Fa-f:]{2,45}(?:%[A-Za-z0-9._-]{1,15})?")
_USER = re.compile(r"[A-Za-z_][A-Za-z0-9._-]{0,31}")
_FILE = re.compile(r"[^-\x00-\x1f\x7f\"%][^\x00-\x1f\x7f\"%]{0,300}")
_ROOT = re.compile(r"/|(/(?!\.\.(?:/|$))[A-Za-z0-9_.+-]{1,100}){1,20}")
_SETTING = re.compile(r"(?:port of )?(\w*)")  # the beginning of an error of a row: the key, in most cases
_OWN = ("device", "host")  # keys that no two boards share, and which have no default


@dataclass(frozen=True)
class BoardRow:
    """A board of the inventory.

    `host`, `port`, `user`, `key` and `known_hosts` are for SSH; empty values leave them to SSH's configuration. `board`
    is the hardware profile that it must have. `server`, `join`, `site` and `data` replace the kit's. A `root` other
    than / is a trial.
    """

    device: str
    host: str
    board: str
    port: int | None = None
    user: str = ""
    key: str = ""
    known_hosts: str = ""
    server: str = ""
    join: str = ""
    site: str = ""
    data: str = ""
    root: str = "/"

    def __post_init__(self) -> None:
        where = f"board {shown(self.device)}"
        for name in (f.name for f in fields(self)):
            if name != "port" and not isinstance(getattr(self, name), str):
                raise ConfigError(f"{where}: {name}", expected="a text", got=shown(getattr(self, name)))
        check_device(self.device, f"{where}: device", error=ConfigError)
        if self.port is not None:
            whole(f"{where}: port", self.port, 1, 65_535)
        for name, pattern, expected in (
            ("host", _HOST, "a host's name or address"),
            ("user", _USER, "a user's name"),
            ("key", _FILE, "a file's name"),
            ("known_hosts", _FILE, "a file's name"),
            ("root", _ROOT, "an absolute path"),
        ):
            if getattr(self, name) or name in ("host", "root"):
                matching(f"{where}: {name}", getattr(self, name), pattern, expected)
        try:
            profile_store.find(self.board)
        except ProfileError as error:
            raise ConfigError(f"{where}: board: {error.what}", hint=error.hint) from error
        self.told(BoardSettings("mqtts://example", self.device))

    def check_files(self) -> None:
        """Raise `ConfigError` if a file that SSH is to read is missing."""
        for name in ("key", "known_hosts"):
            if getattr(self, name) and not Path(getattr(self, name)).is_file():
                raise ConfigError(
                    f"board {shown(self.device)}: {name}: there is no file {Path(getattr(self, name)).absolute()}"
                )

    def told(self, kit: BoardSettings) -> BoardSettings:
        try:
            return BoardSettings(
                self.server or kit.server,
                self.device,
                self.site or kit.site,
                self.data or kit.data,
                kit.authority,
                self.join or kit.join,
            )
        except ConfigError as error:
            what = f"board {shown(self.device)}: {error.what}"
            raise ConfigError(what, expected=error.expected, got=error.got, hint=error.hint) from error

    def __str__(self) -> str:
        return f"{self.device} ({self.host}{'' if self.port in (None, 22) else f':{self.port}'})"


def read_inventory(path: Path) -> tuple[BoardRow, ...]:
    """The boards of an inventory; relative paths in it begin at its folder.

    Raises `ConfigError` with file, line and column if it has an invalid value, or two boards have one name or address.
    """
    body, text = read_toml_text(path, ConfigError)
    places = _Places(path, text)
    places.only(("defaults", "board"), body, (), "", "table")
    names = tuple(f.name for f in fields(BoardRow))
    defaults = _table(body.get("defaults", {}), f"{places.at('defaults')}: defaults")
    places.only(tuple(n for n in names if n not in _OWN), defaults, ("defaults",), "defaults")
    rows = body.get("board", [])
    if not isinstance(rows, list) or not 1 <= len(rows) <= MAX_BOARDS:
        raise ConfigError(places.at("board"), expected=f"1 to {MAX_BOARDS} tables [[board]]", got=shown(rows))
    boards = tuple(_board(row, defaults, names, places, i) for i, row in enumerate(rows))
    for what, named, key in (
        ("device", "device", lambda b: b.device),
        ("address", "host", lambda b: f"{b.host}:{b.port or 22}"),
    ):
        seen: set[str] = set()
        for i, board in enumerate(boards):
            if key(board) in seen:
                place = places.at("board", i, named)
                raise ConfigError(f"{place}: two boards with the {what} {shown(key(board))}")
            seen.add(key(board))
    for i, board in enumerate(boards):  # last, so that a missing file hides no misspelt key
        with places.of_row(rows[i], defaults, i, f"board {shown(board.device)}"):
            board.check_files()
    return boards


class _Places:
    """Lines and columns of an inventory's tables and keys."""

    def __init__(self, path: Path, text: str) -> None:
        self.path = path
        self._found = key_places(text)

    def at(self, *keys: str | int) -> str:
        """File, line and column of a key, or of the table that would have it."""
        while keys and keys not in self._found:
            keys = keys[:-1]
        return ":".join(map(str, (self.path, *self._found[keys]))) if keys else str(self.path)

    def only(
        self,
        allowed: tuple[str, ...],
        body: Mapping[str, Any],
        table: tuple[str | int, ...],
        who: str,
        noun: str = "key",
    ) -> None:
        """Raise `ConfigError` if a table has other keys."""
        other = next((k for k in body if k not in allowed), "")
        only(allowed, body, f"{self.at(*table, other)}{who and ': '}{who}", noun)

    @contextmanager
    def of_row(self, own: Mapping[str, Any], defaults: Mapping[str, Any], number: int, who: str) -> Iterator[None]:
        """Add the setting's place to errors of a row: in the row itself, or among the defaults."""
        try:
            yield
        except ConfigError as error:
            named = _SETTING.match(error.what.removeprefix(f"{who}: "))
            key = "" if named is None else named[1]
            place = self.at("defaults", key) if key in defaults and key not in own else self.at("board", number, key)
            what = f"{place}: {error.what}"
            raise ConfigError(what, expected=error.expected, got=error.got, hint=error.hint) from error


def _table(value: object, where: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise ConfigError(where, expected="a table", got=shown(value))
    return value


def _board(row: object, defaults: Mapping[str, Any], names: tuple[str, ...], places: _Places, number: int) -> BoardRow:
    own = _table(row, f"{places.at('board', number)}: board")
    made = {**defaults, **own}
    who = f"board {shown(made.get('device', ''))}"
    places.only(names, own, ("board", number), who)
    for name in (*_OWN, "board"):
        if name not in made:
            raise ConfigError(
                f"{places.at('board', number)}: {who} has no {name}",
                hint="Its table needs device, host and board, a hardware profile; [defaults] may have board instead.",
            )
    for name in ("key", "known_hosts"):
        if isinstance(made.get(name), str) and made[name]:
            made[name] = str(places.path.parent / Path(made[name]).expanduser())
    with places.of_row(own, defaults, number, who):
        return BoardRow(**made)
