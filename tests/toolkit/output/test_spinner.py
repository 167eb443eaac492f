"""The spinner of commands that are silent at first."""

from __future__ import annotations

import argparse
import io
import sys
from contextlib import redirect_stderr, redirect_stdout

import pytest

from fedprune.core.cli import run_command
from fedprune.output import spinner as module
from fedprune.output.spinner import spinner
from support.waiting import until

pytestmark = pytest.mark.board


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "AFTER_S", 0.01)
    monkeypatch.setenv("TERM", "xterm")


def appeared(stream: io.StringIO) -> bool:
    return until(lambda: "⠋ fedprune-x" in stream.getvalue())


@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_it_appears_in_silence_and_goes_before_the_first_output(name: str) -> None:
    streams = {"stdout": io.StringIO(), "stderr": Terminal()}
    terminal = streams["stderr"]
    with redirect_stdout(streams["stdout"]), redirect_stderr(terminal):
        with spinner("fedprune-x"):
            assert appeared(terminal)
            print("hello", file=getattr(sys, name))
            shown = terminal.getvalue()
            assert shown.removesuffix("hello\n").endswith("\r\x1b[2K")
            print("more", file=getattr(sys, name))
            assert terminal.getvalue().removesuffix("more\n") == shown
        assert sys.stderr is terminal
    assert streams[name].getvalue().endswith("hello\nmore\n")


def test_it_is_erased_where_an_error_ends_the_command() -> None:
    terminal = Terminal()

    def failing() -> None:
        with spinner("fedprune-x"):
            assert appeared(terminal)
            raise ValueError("x")

    with redirect_stderr(terminal):
        with pytest.raises(ValueError, match="x"):
            failing()
        assert sys.stderr is terminal
    assert terminal.getvalue().endswith("\r\x1b[2K")


@pytest.mark.parametrize("kind", ["pipe", "dumb"])
def test_without_a_terminal_there_is_none(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Terminal() if kind == "dumb" else io.StringIO()
    monkeypatch.setenv("TERM", "dumb" if kind == "dumb" else "xterm")
    with redirect_stderr(stream), spinner("fedprune-x"):
        assert sys.stderr is stream
    assert stream.getvalue() == ""


@pytest.mark.timeout(20)
def test_a_signal_that_interrupts_its_end_may_write() -> None:
    terminal = Terminal()
    with redirect_stderr(terminal), spinner("fedprune-x"):
        assert appeared(terminal)
        write = terminal.write

        def interrupted(text: str) -> int:
            terminal.write = write  # type: ignore[method-assign]
            sys.stderr.write("asked to stop\n")
            return write(text)

        terminal.write = interrupted  # type: ignore[method-assign]
        sys.stderr.writelines(["hello\n"])
    assert terminal.getvalue().endswith("hello\n")


def test_it_appears_while_a_command_is_imported() -> None:
    terminal = Terminal()

    def build() -> argparse.ArgumentParser:
        assert appeared(terminal)
        parser = argparse.ArgumentParser(prog="fedprune-x")
        parser.set_defaults(run=lambda _: print("done"))
        return parser

    with redirect_stdout(io.StringIO()) as out, redirect_stderr(terminal):
        assert run_command("fedprune-x", build, []) == 0
    assert out.getvalue() == "done\n"
    assert terminal.getvalue().endswith("\r\x1b[2K")
