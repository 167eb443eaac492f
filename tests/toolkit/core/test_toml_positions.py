"""Keys of a TOML text are found where they stand: all that the parser finds, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedprune.core.toml_file import parse_toml
from fedprune.core.toml_positions import key_places
from support.paths import ROOT

pytestmark = pytest.mark.board

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


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_they_are_found_where_they_stand(end: str) -> None:
    found = key_places(HARD.replace("\n", end))
    lines = HARD.splitlines()
    for path, word in {
        ("top",): "top", ("a", "b", "c d"): "a . b", ("list",): "list", ("list", 3, "l", 1, "m"): "m = 2",
        ("table", "in ner", "key"): "key", ("last",): "last", ("last", "indented"): "indented",
    }.items():  # fmt: skip
        line, column = found[path]
        assert lines[line - 1][column - 1 :].startswith(word)
    assert [found["many", n, "name"][0] for n in (0, 1)] == [n for n, t in enumerate(lines, 1) if t.startswith("name")]


@pytest.mark.parametrize("file", [*sorted(ROOT.glob("hardware_profiles/*.toml")), ROOT / "pyproject.toml"], ids=str)
def test_files_of_this_repository(file: Path) -> None:
    text = file.read_text()
    assert named(key_places(text)) == set(paths(parse_toml(text)))


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


@pytest.mark.parametrize("text", ["[" * 100_000, "a = " + "[" * 100_000, "a = {b = " * 50_000, '"' * 9999, "a=" * 9999])
def test_what_is_no_toml_ends_all_the_same(text: str) -> None:
    key_places(text)
