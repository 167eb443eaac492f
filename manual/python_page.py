"""The page of the Python API: the public names with a line each, and where the site shows all of their docstrings."""

from __future__ import annotations

import inspect
from importlib import import_module

from manual.docstring import summary

_HEAD = """# Python

<!-- Made by `python -m manual`: change the docstrings instead. -->

The names in each package's `__all__`. In a clone this page has one line for each; the site (`make docs`) adds types and
docstrings. From `fedprune` and `fedprune_device` imports need what a board has: numpy, and onnxruntime where a model
runs. All raise subclasses of `FedpruneError`, whose exit code says [what to do](../exit-codes.md).
"""
_PACKAGES = {
    "fedprune": ("The method", ""),
    "fedprune_export": ("Export", "[Export from Python](../export.md#from-python) begins with an example."),
    "fedprune_server": ("Simulate", "[Simulate from Python](../simulate.md#from-python) begins with an example."),
    "fedprune_device": ("On a board", ""),
    "fedprune.strategies": (
        "Strategies",
        "[Write a strategy](../write-a-strategy.md) shows how methods are overridden and roles combined.",
    ),
    "fedprune.updates": ("Codecs of weights", ""),
}
_SITE = "::: {}\n    options:\n      show_root_heading: false\n      heading_level: 3"


def page() -> str:
    """The page, in Markdown."""
    sections = []
    for package, (title, text) in _PACKAGES.items():
        module = import_module(package)
        names = "\n".join(_line(name, getattr(module, name)) for name in module.__all__)
        sections += [f"## {title}", text, f"From `{package}`:\n\n{names}", _SITE.format(package)]
    return "\n\n".join([_HEAD.rstrip(), *filter(None, sections)]) + "\n"


def _line(name: str, thing: object) -> str:
    """A name, and its docstring's first paragraph; a value has only its type's docstring."""
    documented = inspect.isclass(thing) or inspect.isfunction(thing) or inspect.ismodule(thing)
    return f"- `{name}`" + (f": {summary(thing)}" if documented else "")
