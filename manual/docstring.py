"""Docstrings taken apart: what a class is, and what it says of each attribute."""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from itertools import pairwise
from typing import Any

_SECTION = re.compile(r"^(?:Attributes|Args|Raises|Returns):$", re.MULTILINE)
_ENTRY = re.compile(r"^    (\w+): (.*(?:\n {8}.*)*)", re.MULTILINE)
_ROLE = re.compile(r"``([^`]*)``")


def summary(thing: Any) -> str:
    """What a docstring says before its first section, in one paragraph."""
    return _flat(_SECTION.split(inspect.getdoc(thing) or "")[0].split("\n\n")[0])


def attributes(cls: type[Any]) -> dict[str, str]:
    """What the docstrings of a class and its bases say of each attribute, in the order of the fields."""
    texts: dict[str, str] = {}
    for kind in reversed(cls.__mro__):
        _, _, section = (inspect.cleandoc(kind.__doc__ or "")).partition("\nAttributes:\n")
        texts |= {name: _flat(text) for name, text in _ENTRY.findall(_SECTION.split(section)[0])}
    return texts


def field_docstrings(cls: type[Any]) -> dict[str, str]:
    """The docstring below each field of a class, where it has one."""
    (body,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    found = {}
    for field, below in pairwise(body.body if isinstance(body, ast.ClassDef) else []):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(below, ast.Expr):
            found[field.target.id] = _flat(ast.literal_eval(below.value))
    return found


def _flat(text: str) -> str:
    return _ROLE.sub(r"`\1`", " ".join(text.split()))
