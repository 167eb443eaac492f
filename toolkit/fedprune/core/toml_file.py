"""TOML files, in which people write settings and profiles."""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path
from typing import Any

from fedprune.core.disk import read_file
from fedprune.core.errors import FedpruneError, MissingExtraError, path_remedy

# The largest TOML file: enough for a table of some ten thousand boards. Parsers in Python take seconds for more.
_MAX_FILE_BYTES = 4 * 2**20

# Parts of a dotted key: parsers walk all earlier parts for each, which takes time by the square.
_MAX_KEY_PARTS = 100


def read_toml(path: Path, error: type[FedpruneError]) -> dict[str, Any]:
    """The tables of a TOML file. Raises `error`, which names the file and the line, if it can't be read or is invalid,
    and `MissingExtraError` for Python 3.10 without the package tomli."""
    _parser()
    try:
        raw = read_file(path, _MAX_FILE_BYTES)
    except OSError as cause:
        raise error(f"can't read {path}: {cause.strerror}", hint=path_remedy(cause)) from cause
    try:
        return parse_toml(raw.decode("utf-8-sig"))  # editors of Windows put a mark first
    except UnicodeDecodeError as cause:
        line = raw.count(b"\n", 0, cause.start) + 1
        raise error(f"{path}:{line}: this is not TOML (not UTF-8 at line {line})") from cause
    except ValueError as cause:  # the parser's own error is one, and names the line
        position = re.search(r"at line (\d+), column (\d+)", str(cause))
        where = "" if position is None else f":{position[1]}:{position[2]}"
        raise error(f"{path}{where}: this is not TOML ({_readable_error(cause)})") from cause


_NAME_TUPLE = re.compile(r"\((?:'[^']*'(?:, |,)?)+\)")


def _readable_error(cause: ValueError) -> str:
    """A parser's message for people: the parser shows a table's name as a Python tuple."""
    return _NAME_TUPLE.sub(lambda match: "[" + ".".join(re.findall("'([^']*)'", match[0])) + "]", str(cause))


def parse_toml(text: str) -> dict[str, Any]:
    """The tables of a TOML text. Raises `ValueError`, which names the line, and `MissingExtraError` as `read_toml`."""
    _check_keys(text)
    try:
        body: dict[str, Any] = _parser().loads(text)
    except RecursionError as cause:
        raise ValueError("nested too deep") from cause
    return body


# Strings and comments of a TOML text: dots in them make no key.
_QUOTED = re.compile(
    r"""
    "{3}(?:[^"\\]|\\.|"{1,2}(?!"))*"{3} | '{3}(?:[^']|'{1,2}(?!'))*'{3}  # of several lines
    | "(?:[^"\\\n]|\\.)*" | '[^'\n]*' | \#[^\n]*
    """,
    re.DOTALL | re.VERBOSE,
)


def _check_keys(text: str) -> None:
    """Raise `ValueError` for a dotted key of more than `_MAX_KEY_PARTS` parts."""
    # Nearly every file ends here: counting dots is cheaper than finding its strings.
    if text.count(".") < _MAX_KEY_PARTS:
        return
    unquoted = _QUOTED.sub(lambda match: '""' + "\n" * match[0].count("\n"), text)
    for number, line in enumerate(unquoted.split("\n"), 1):
        if line.count(".") < _MAX_KEY_PARTS:
            continue
        for key in re.split(r"[=,\[\]{}#]", line):
            if sum(bool(name.strip()) for name in key.split(".")) > _MAX_KEY_PARTS:
                raise ValueError(f"a key of more than {_MAX_KEY_PARTS} parts at line {number}, column 1")


def _parser() -> Any:
    for name in ("tomllib", "tomli"):  # the first is part of Python since 3.11
        try:
            return import_module(name)
        except ModuleNotFoundError:  # noqa: PERF203
            continue
    raise MissingExtraError("TOML files need Python 3.11 or the package tomli", hint="pip install tomli.")
