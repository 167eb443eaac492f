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
from support.paths import ROOT

pytestmark = pytest.mark.board


def test_tables_are_read(tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    path.write_bytes('x = 1\r\n[t]\r\ny = "é"\r\n'.encode())
    assert read_toml(path, ConfigError) == {"x": 1, "t": {"y": "é"}}


@pytest.mark.parametrize("raw", [b"ok = 1\nbroken\n", b"ok = 1\nx = = 2", b"ok = 1\n# \xff\n", b"ok = 1\nok = 2\n"])
def test_the_file_and_the_line_of_an_error_are_named(tmp_path: Path, raw: bytes) -> None:
    path = tmp_path / "a.toml"
    path.write_bytes(raw)
    with pytest.raises(ProfileError, match=r"a\.toml(:2(:\d+)?: .*line 2|: .*end of document)"):
        read_toml(path, ProfileError)


def test_a_table_that_is_declared_twice_is_named_as_it_is_written(tmp_path: Path) -> None:
    path = tmp_path / "sweep.toml"
    path.write_text(
        '[[runs]]\njob = { strategy = "fedavg", options = {} }\n[runs.job.options]\nweighting = "uniform"\n'
    )
    with pytest.raises(ConfigError, match=r"sweep\.toml:3:\d+: this is not TOML \(.* \[runs\.job\.options\]") as caught:
        read_toml(path, ConfigError)
    assert "'" not in str(caught.value)


def test_deep_nesting_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    path.write_text("x = " + "[" * 100_000)
    with pytest.raises(ConfigError, match=r"a\.toml: this is not TOML"):
        read_toml(path, ConfigError)


@pytest.mark.parametrize("name", ["absent.toml", "."])
def test_what_cannot_be_read_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=r"can't read .*"):
        read_toml(tmp_path / name, ConfigError)


def test_without_a_parser_the_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("tomllib", "tomli"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingExtraError, match="tomli"):
        read_toml(tmp_path / "a.toml", ConfigError)


def test_a_file_that_is_not_there_comes_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^can't read .*a\.toml: No such file or directory\. Check the path"):
        read_toml(tmp_path / "a.toml", ConfigError)


@pytest.mark.timeout(20)
@pytest.mark.parametrize("form", ["{} = 1", "[{}]", "x = {{ {} = 1 }}", '"a" . {} = 1'])
def test_a_key_of_very_many_parts_is_refused_at_once(tmp_path: Path, form: str) -> None:
    path = tmp_path / "a.toml"
    path.write_text("ok = 1\n" + form.format(".".join(["a"] * 200_000)))
    with pytest.raises(ConfigError, match=r"a\.toml:2:1: this is not TOML \(a key of more than 100 parts at line 2"):
        read_toml(path, ConfigError)


def test_many_dots_elsewhere_are_fine(tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    numbers = ", ".join(["0.5"] * 1000)
    addresses = " ".join(["10.0.0.1"] * 40)
    lines = [
        f"x = [{numbers}]",
        f"# {addresses}",
        f"y = '{addresses}'",
        f'z = "\\"{addresses}"',
        f'w = """\n"{addresses}\n"""',
    ]
    path.write_text("\n".join(lines))
    body = read_toml(path, ConfigError)
    assert len(body["x"]) == 1000
    assert [body[name].strip('"\n') for name in "yzw"] == [addresses] * 3


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
