"""Every command that prints a result prints it as JSON, too; those without the option are listed, with the reason."""

from __future__ import annotations

import argparse

from manual.command_pages import _commands, _parsers

_RUNS = "it runs until it is stopped, and logs"
_CHANGES = "it changes something and has no result but its exit code"
_TEXT = "what it prints is a file or command lines to be used as they are"
_FOLDER = "its figures are in metrics.json in the folder that it writes"

WITHOUT = {
    "fedprune-server run": _RUNS,
    "fedprune-server claim": "it prints nothing but the claims, one on each line",
    "fedprune-server demo": _FOLDER,
    "fedprune-server service print": _TEXT,
    "fedprune-server service install": _CHANGES,
    "fedprune-server operators add": _CHANGES,
    "fedprune-server operators password": _CHANGES,
    "fedprune-server operators remove": _CHANGES,
    "fedprune-server pause": _CHANGES,
    "fedprune-server resume": _CHANGES,
    "fedprune-device join": _CHANGES,
    "fedprune-device run": _RUNS,
    "fedprune-device install": _CHANGES,
    "fedprune-device update": _CHANGES,
    "fedprune-device unit": _TEXT,
    "fedprune-flash image": "it writes an image and may ask before it writes a card; its plan is for people",
    "fedprune-flash jetson": _TEXT,
    "fedprune-simulate new": _CHANGES,
}
"""Commands without --json, and why."""


def _leaves(parser: argparse.ArgumentParser) -> list[argparse.ArgumentParser]:
    inner = [leaf for _, child, _ in _commands(parser) for leaf in _leaves(child)]
    return inner or [parser]


def test_every_command_that_prints_a_result_has_json() -> None:
    leaves = [leaf for _, parser in _parsers() for leaf in _leaves(parser)]
    without = {leaf.prog for leaf in leaves if "--json" not in leaf._option_string_actions}
    assert len(leaves) > 50
    assert without == set(WITHOUT)
