"""TOML files: read whole, or refused by file and line."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedprune.core.errors import ConfigError, MissingExtraError, ProfileError
from fedprune.core.toml_file import parse_toml, read_toml
from fedprune.core.toml_positions import key_places

pytestmark = pytest.mark.board


@pytest.mark.parametrize("raw", [b"ok = 1\nbroken\n", b"ok = 1\nx = = 2", b"ok = 1\n# \xff\n", b"ok = 1\nok = 2\n"])
def test_the_file_and_the_line_of_an_error_are_named(tmp_path: Path, raw: bytes) -> None:
    path = tmp_path / "a.toml"
    path.write_bytes(raw)
    with pytest.raises(ProfileError, match=r"a\.toml(:2(:\d+)?: .*line 2|: .*end of document)"):
        read_toml(path, ProfileError)


def test_deep_nesting_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    path.write_text("x = " + "[" * 100_000)
    with pytest.raises(ConfigError, match=r"a\.toml: this is not TOML"):
        read_toml(path, ConfigError)


def test_without_a_parser_the_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("tomllib", "tomli"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingExtraError, match="tomli"):
        read_toml(tmp_path / "a.toml", ConfigError)


@pytest.mark.timeout(20)
@pytest.mark.parametrize("form", ["{} = 1", "x = {{ {} = 1 }}"])
def test_a_key_of_very_many_parts_is_refused_at_once(tmp_path: Path, form: str) -> None:
    path = tmp_path / "a.toml"
    path.write_text("ok = 1\n" + form.format(".".join(["a"] * 200_000)))
    with pytest.raises(ConfigError, match=r"a\.toml:2:1: this is not TOML \(a key of more than 100 parts at line 2"):
        read_toml(path, ConfigError)


@pytest.mark.timeout(20)
def test_a_pipe_and_an_endless_file_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.toml")
    with pytest.raises(ConfigError, match=r"can't read .*pipe\.toml: not a regular file"):
        read_toml(tmp_path / "pipe.toml", ConfigError)
    with pytest.raises(ConfigError, match=r"can't read /dev/zero: not a regular file"):
        read_toml(Path("/dev/zero"), ConfigError)


HARD = '''\
# a # comment = 1
top = 1  # x = 2
"quoted.key" = "a = # \\" b"
'lite.ral' = 'c:\\dir\\'
a . b . "c d" = 3
long = """
no = 1
[none]
\\""" still "" text """""
raw = \'\'\'
no = 2
\'\'\'\'\'
empty = ""
when = 1979-05-27 07:32:00  # a space in it
list = [ 1, "x = [", [2, 3], # no = 3
  { k = "}", l = [1, { m = 2 }] },
]
"\\u00e9t\\u00e9" = { x.y = 1, "]" = "[" }

[ table . "in ner" ]
key = 1
[[many]]
name = "a"
[many.sub]
x = 1
[[many]]
name = "b"
[[many.more]]
[[many.more]]
z = 1
\t[last]
  \tindented = true
'''


def paths(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """Every key of parsed tables, by its path."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield (*path, key)
            yield from paths(inner, (*path, key))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from paths(inner, (*path, index))


def named(found: Mapping[tuple[str | int, ...], tuple[int, int]]) -> set[tuple[str | int, ...]]:
    return {path for path in found if isinstance(path[-1], str)}


def test_all_keys_are_found_and_nothing_else() -> None:
    assert named(key_places(HARD)) == set(paths(parse_toml(HARD)))


PIECES = st.sampled_from(
    [
        "a",
        "b.c",
        '"x y"',
        "'z'",
        " = ",
        "1",
        '"t"',
        "'''u\nv'''",
        '"""w"""',
        "[",
        "]",
        "[[",
        "]]",
        "{",
        "}",
        ", ",
        "\n",
        "#n\n",
    ]
)


@given(st.lists(PIECES, max_size=30).map("".join))
def test_of_what_the_parser_takes_all_keys_are_found(text: str) -> None:
    found = key_places(text)
    try:
        body = parse_toml(text)
    except ValueError:
        return
    assert named(found) == set(paths(body))


@pytest.mark.parametrize("text", ["[" * 100_000, "a = {b = " * 50_000, '"' * 9999])
def test_what_is_no_toml_ends_all_the_same(text: str) -> None:
    key_places(text)
