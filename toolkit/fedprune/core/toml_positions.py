"""Line and column of the keys of a TOML text, which Python's own parser doesn't report.

The parser has accepted the text already, so this module knows only enough of the grammar to find keys: headers, keys,
strings, arrays and inline tables. Source: TOML 1.0.0, https://toml.io/en/v1.0.0.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from typing import Any

_BLANK = re.compile(r"(?:[ \t\r\n]|#[^\n]*)*")
_SPACE = re.compile(r"[ \t]*")
_BARE = re.compile(r"[A-Za-z0-9_-]+")
_LONG = re.compile(r"""\"{3}(?:\\.|[^\\])*?\"{3,5}|'{3}.*?'{3,5}""", re.DOTALL)
_SHORT = re.compile(r"""\"(?:\\.|[^"\\\n])*\"|'[^'\n]*'""")
_PLAIN = re.compile(r"[^,\]}#\n]*")
_ESCAPE = re.compile(r"\\(u[0-9a-fA-F]{4}|U[0-9a-fA-F]{8}|.)")
_ESCAPED = {"b": "\b", "t": "\t", "n": "\n", "f": "\f", "r": "\r", "e": "\x1b"}

_DEEPEST = 100
"""Maximum nesting of arrays and inline tables; the parser has a similar limit of its own."""


def key_places(text: str) -> dict[tuple[str | int, ...], tuple[int, int]]:
    """The line and column, counted from 1, at which each key and table of a valid TOML text is first named.

    Paths look like `("job", "recipe", "lr")`; an element of an array of tables has its index, from 0, in its path. Keys
    below 100 levels are left out.
    """
    return _Scanner(text).scan()


class _Scanner:
    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0
        self._lines = [0, *(m.end() for m in re.finditer("\n", text))]
        self._found: dict[tuple[str | int, ...], tuple[int, int]] = {}
        self._counts: dict[tuple[str | int, ...], int] = {}
        """The latest index of each array of tables."""

    def scan(self) -> dict[tuple[str | int, ...], tuple[int, int]]:
        table: tuple[str | int, ...] = ()
        while True:
            self._skip(_BLANK)
            before = self._at
            if before >= len(self._text):
                return self._found
            if self._text.startswith("[", before):
                table = self._header()
            else:
                self._pair(table, 0)
            if self._at == before:  # not TOML
                return self._found

    def _header(self) -> tuple[str | int, ...]:
        several = self._text.startswith("[[", self._at)
        self._at += 2 if several else 1
        self._skip(_SPACE)
        start = self._at
        path: tuple[str | int, ...] = ()
        names = self._names()
        for n, name in enumerate(names):
            path = (*path, name)
            self._note(path, start)
            if several and n == len(names) - 1:
                self._counts[path] = self._counts.get(path, -1) + 1
            if path in self._counts:
                path = (*path, self._counts[path])
                self._note(path, start)
        while self._text.startswith((" ", "\t", "]"), self._at):
            self._at += 1
        return path

    def _pair(self, table: tuple[str | int, ...], depth: int) -> None:
        start = self._at
        path = table
        for name in self._names():
            path = (*path, name)
            self._note(path, start)
        self._skip(_SPACE)
        if self._text.startswith("=", self._at):
            self._at += 1
            self._skip(_SPACE)
            self._value(path, depth)

    def _names(self) -> list[str]:
        names = []
        while True:
            self._skip(_SPACE)
            if (quoted := _SHORT.match(self._text, self._at)) is not None:
                names.append(_unquoted(quoted[0]))
                self._at = quoted.end()
            elif (bare := _BARE.match(self._text, self._at)) is not None:
                names.append(bare[0])
                self._at = bare.end()
            else:
                return names
            self._skip(_SPACE)
            if not self._text.startswith(".", self._at):
                return names
            self._at += 1

    def _value(self, path: tuple[str | int, ...], depth: int) -> None:
        first = self._text[self._at : self._at + 1]
        if first in ("[", "{") and depth >= _DEEPEST:
            self._at = len(self._text)
        elif first == "[":
            self._list(path, depth + 1)
        elif first == "{":
            self._braces(path, depth + 1)
        else:
            for kind in (_LONG, _SHORT, _PLAIN):
                if (found := kind.match(self._text, self._at)) is not None:
                    self._at = found.end()
                    return

    def _list(self, path: tuple[str | int, ...], depth: int) -> None:
        self._at += 1
        index = 0
        while True:
            self._skip(_BLANK)
            before = self._at
            if before >= len(self._text):
                return
            if self._text.startswith("]", before):
                self._at += 1
                return
            if self._text.startswith(",", before):
                self._at += 1
                index += 1
                continue
            self._value((*path, index), depth)
            if self._at == before:
                return

    def _braces(self, path: tuple[str | int, ...], depth: int) -> None:
        self._note(path, self._at)
        self._at += 1
        while True:
            self._skip(_BLANK)
            before = self._at
            if self._text.startswith("}", before):
                self._at += 1
                return
            if self._text.startswith(",", before):
                self._at += 1
                continue
            self._pair(path, depth)
            if self._at == before:
                return

    def _skip(self, what: re.Pattern[str]) -> None:
        found = what.match(self._text, self._at)
        if found is not None:
            self._at = found.end()

    def _note(self, path: tuple[str | int, ...], start: int) -> None:
        if path not in self._found:
            line = bisect_right(self._lines, start)
            self._found[path] = (line, start - self._lines[line - 1] + 1)


def _unquoted(text: str) -> str:
    if text[0] == "'":
        return text[1:-1]
    return _ESCAPE.sub(_plain, text[1:-1])


def _plain(escape: Any) -> str:
    code: str = escape[1]
    if code[0] in "uU" and len(code) > 1:
        number = int(code[1:], 16)
        return chr(number) if number < 0x110000 else ""
    return _ESCAPED.get(code, code)
