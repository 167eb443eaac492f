"""Hints of the product that name a command or an option: where they stand, and what a user does who follows one."""

from __future__ import annotations

import ast
import inspect
import json
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from importlib import import_module
from pathlib import Path

import pytest

import fedprune_export as fx
from fedprune.planning import profile_store
from fedprune_export.importing import ImportChoices
from support.paths import ROOT

_KEYWORDS = {f.name for f in fields(ImportChoices)} | {*inspect.signature(fx.export).parameters}
_OPTION = r"(?<![\w-])--[a-z][a-z-]+"
_NAMED = re.compile(
    rf"{_OPTION}| in (?:its|the board's) profile|"
    rf"fedprune-(?:export|server|device|simulate|flash) [a-z]|\b(?:{'|'.join(_KEYWORDS)})=(?!=)"
)

# What a hint says to do: a command, an option of which a part is left out, or an option.
_STEP = re.compile(
    r"`(?=fedprune-)(?P<command>[^`]+)`"
    rf"|eave (?P<part>\S+) out of (?P<whole>{_OPTION})|(?P<option>{_OPTION})(?: (?P<value>[^\s;)(`]+))?"
)
_LEFT_OUT = re.compile(r"\b([Ll]eave|without|no)\b[^,;:.]*$")

# The grammar of a command line, whose texts its help shows.
_GRAMMAR = re.compile(r"add_\w+|CommandParser|setting")
_GRAMMAR_NAMES = re.compile(r"_?EXAMPLES|.*_HELP")


@dataclass(frozen=True)
class Hint:
    """A text of the product, with {} for what it is given when it is shown."""

    place: str
    text: str

    @property
    def pattern(self) -> str:
        return ".*?".join(re.escape(part) for part in re.split(r"\{\d*\}", self.text)) + r"(?=[\s,.;)]|$)"


@dataclass(frozen=True)
class Case:
    """A refusal, or a note, whose hint is followed.

    Attributes:
        hint: A part of the hint's text, which no other hint has.
        line: The command line that shows it; of `fedprune-export` if it begins with no program.
        fill: Values of options, and of words in capitals, that the hint leaves to the user; "" for an option without
            a value, None for what this input doesn't need.
        in_order: Whether the hint's steps follow each other, instead of being ways of their own.
        before: Command lines that come before it, joined by " && ".
    """

    hint: str
    line: str
    fill: Mapping[str, str | None] = field(default_factory=dict)
    in_order: bool = False
    before: str = ""

    def ways(self, shown: str) -> Iterator[list[str]]:
        """The command lines of a user who follows what a hint says, as it was shown."""
        words = shlex.split(self.line)
        for setting in re.finditer(r"(\w+)\.(\w+) = (\S+) in (?:its|the board's) profile", shown):
            yield _with(words, "--target", _changed_profile(words[words.index("--target") + 1], *setting.groups()))
        for step in _STEP.finditer(shown):
            if step["command"]:
                # A service is not started: whether it takes the options is seen in its help.
                service = ["--help"] if step["command"].split()[1:2] == ["run"] else []
                if self.in_order:
                    yield words
                yield [self.fill.get(word) or word for word in shlex.split(step["command"])] + service
                continue
            option, token = step["whole"] or step["option"], (step["value"] or "").rstrip(".,")
            value = self.fill.get(option, self.fill.get(token, token))
            if step["whole"]:
                parts = words[words.index(option) + 1].split(",")
                changed = _with(words, option, ",".join(part for part in parts if part != step["part"]))
            elif _LEFT_OUT.search(shown[: step.start()]):
                changed = _with(words, option, None)
            elif value is None:
                continue
            else:
                changed = _with(words, option, value)
            if self.in_order:
                words = changed
            else:
                yield changed
        if self.in_order:
            yield words


def _changed_profile(target: str, table: str, key: str, value: str) -> str:
    """A file in the current folder with a board's profile in which one setting is another."""
    body = json.loads(profile_store.find_typed_profile(target, []).to_json())
    body[table][key] = json.loads(value)
    Path("changed.json").write_text(json.dumps(body))
    return "changed.json"


def _with(words: Sequence[str], option: str, value: str | None) -> list[str]:
    """A command line with another value of an option: None to leave it out, as is done for no value of one that had
    one, and "" for an option without a value."""
    out = list(words)
    if option in out and option != "--set":
        at = out.index(option)
        del out[at : at + 2]
        return out if not value else [*out, option, value]
    return out if value is None else [*out, option, *([value] if value else [])]


def hints_in(*folders: str) -> list[Hint]:
    """The hints that stand in folders of the clone."""
    paths = sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))
    return [
        Hint(f"{path.relative_to(ROOT)}:{line}", " ".join(text.split()))
        for path in paths
        for line, text in _shown_texts(ast.parse(path.read_text()))
        if " " in text.strip() and _NAMED.search(text) and "pip install" not in text
    ]


def _shown_texts(node: ast.AST) -> Iterator[tuple[int, str]]:
    """Texts that are shown to users: neither docstrings, nor what is the matter, nor the help of a command line."""
    match node:
        case ast.Expr(value=ast.Constant()):
            return
        case ast.Assign(targets=[ast.Name(id=name)]) if _GRAMMAR_NAMES.fullmatch(name):
            return
        case ast.Call(func=ast.Name(id=name) | ast.Attribute(attr=name)):
            if _GRAMMAR.fullmatch(name):
                return
            # The first argument of an error says what is the matter.
            arguments = node.args[name.endswith("Error") :]
            for part in (*arguments, *(keyword.value for keyword in node.keywords)):
                yield from _shown_texts(part)
        case ast.Constant(value=str(text)):
            yield node.lineno, text
        case ast.JoinedStr():
            yield node.lineno, "".join(str(v.value) if isinstance(v, ast.Constant) else "{}" for v in node.values)
        case _:
            for child in ast.iter_child_nodes(node):
                yield from _shown_texts(child)


def check_all_have_cases(hints: Sequence[Hint], cases: Sequence[Case]) -> None:
    """Every hint has a case, and every case a hint."""
    lacking = [f"{hint.place}: {hint.text!r}" for hint in hints if not any(case.hint in hint.text for case in cases)]
    assert not lacking, "hints that no case follows:\n" + "\n".join(lacking)
    left_over = [case.hint for case in cases if not any(case.hint in hint.text for hint in hints)]
    assert not left_over, f"cases whose hints are gone: {left_over}"


def run(words: Sequence[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """The exit code of a command line, and all that it prints, on one line."""
    program, arguments = (words[0], words[1:]) if words[0].startswith("fedprune-") else ("fedprune-export", words)
    package = program.replace("-", "_")
    capsys.readouterr()
    try:
        code = import_module(f"{package}.cli.main").main(list(arguments))
    except SystemExit as end:
        code = int(end.code or 0)
    return code, " ".join("".join(capsys.readouterr()).split())


def shown_hint(case: Case, hints: Sequence[Hint], capsys: pytest.CaptureFixture[str]) -> str:
    """What is shown of a case's hint by its command line."""
    _, printed = run(shlex.split(case.line), capsys)
    # The shortest first: a text may be a part of another.
    for hint in sorted(hints, key=lambda hint: len(hint.text)):
        if case.hint in hint.text and (found := re.search(hint.pattern, printed)):
            return found[0]
    raise AssertionError(f"{case.line} doesn't show {case.hint!r} but: {printed}")
