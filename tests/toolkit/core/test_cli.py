"""Errors of commands: one line on stderr and the right exit code, tracebacks only on request."""

import argparse
import errno
import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedprune.core.cli import (
    check_command,
    positive_hours,
    positive_integer,
    positive_seconds,
    print_json,
    run_command,
    signals_as_interrupts,
    with_extra,
)
from fedprune.core.command_parser import DEBUG_VARIABLE, CommandParser
from fedprune.core.errors import ExitCode, ModelError, RuntimeUnavailableError, UsageError
from fedprune.output.extras import install_command

pytestmark = pytest.mark.board


def command(action: Callable[[], Any]) -> int:
    def build() -> CommandParser:
        parser = CommandParser(prog="tool")
        parser.set_defaults(run=lambda arguments: action())
        return parser

    return run_command("tool", build, [])


def failing(error: BaseException) -> Callable[[], Any]:
    def action() -> None:
        raise error

    return action


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UsageError("bad option"), ExitCode.USAGE),
        (OSError(errno.ENOSPC, "No space left on device", "x"), ExitCode.STORAGE_FULL),
        (PermissionError(errno.EACCES, "Permission denied", "x"), ExitCode.STORAGE),
        (MemoryError(), ExitCode.INTERNAL),
        (OSError("strange"), ExitCode.INTERNAL),
    ],
)
def test_errors_are_one_line_and_a_code(
    error: BaseException, code: ExitCode, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(DEBUG_VARIABLE, raising=False)

    assert command(failing(error)) == code

    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1


def by(error: BaseException, cause: BaseException) -> BaseException:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (KeyboardInterrupt(), "interrupted\n"),
        (KeyboardInterrupt("go on"), "interrupted: go on\n"),
        # as a compiled module fails that is just being imported
        (
            by(RuntimeUnavailableError("no onnxruntime"), by(ImportError("failed"), KeyboardInterrupt())),
            "interrupted\n",
        ),
    ],
)
def test_an_interruption_is_no_error(error: BaseException, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(failing(error)) == ExitCode.INTERRUPTED
    assert capsys.readouterr().err == message


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_a_command_like_ctrl_c(number: signal.Signals) -> None:
    before = signal.getsignal(number)

    def action() -> None:
        with signals_as_interrupts():
            signal.raise_signal(number)
            pytest.fail("it went on")

    assert command(action) == ExitCode.INTERRUPTED
    assert signal.getsignal(number) is before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["look", "--number", "x"], "argument --number: expected a whole number, got 'x'. See `tool look --help`.\n"),
        (
            ["look", "--number", "1", "--share", "nan"],
            "argument --share: expected a finite number, got 'nan'. See `tool look --help`.\n",
        ),
        (["look"], "the following arguments are required: --number. See `tool look --help`.\n"),
        ([], "the following arguments are required: COMMAND. See `tool --help`.\n"),
    ],
)
def test_a_usage_error_is_one_line(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    def build() -> CommandParser:
        parser = CommandParser(prog="tool")
        look = parser.add_subparsers(dest="command", required=True, metavar="COMMAND").add_parser("look")
        look.add_argument("--number", type=int, required=True)
        look.add_argument("--share", type=float)
        return parser

    with pytest.raises(SystemExit) as caught:
        run_command("tool", build, words)
    assert caught.value.code == ExitCode.USAGE
    assert capsys.readouterr().err == f"error: {message}"


def test_debug_shows_the_traceback(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(DEBUG_VARIABLE, "1")

    command(failing(ModelError("bad model")))

    err = capsys.readouterr().err
    assert "Traceback" in err
    assert err.endswith("error: bad model\n")


def test_a_missing_package_names_the_extra(capsys: pytest.CaptureFixture[str]) -> None:
    def run(arguments: argparse.Namespace) -> int:
        raise ModuleNotFoundError("No module named 'onnx'", name="onnx")

    assert command(lambda: with_extra("server", run)(argparse.Namespace())) == ExitCode.MISSING_EXTRA
    assert f"needs onnx, which is not installed. {install_command('server')}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("kind", "text"),
    [(positive_integer, t) for t in ("0", "-4", "1.5", "many", str(2**63), "9" * 5000)]
    + [(kind, t) for kind in (positive_seconds, positive_hours) for t in ("0", "-1", "inf", "nan", "soon", "1e300")],
)
def test_a_number_out_of_range_is_refused_in_words(kind: Callable[[str], object], text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=rf"above 0.*, got '{text}'"):
        kind(text)


def parser() -> CommandParser:
    out = CommandParser(prog="tool")
    out.add_argument("--version", action="version", version="1")
    commands = out.add_subparsers(required=True)
    run = commands.add_parser("run")
    run.add_argument("--config", required=True)
    run.add_argument("--density", type=float)
    run.set_defaults(run=lambda arguments: arguments.density != 0.5)
    commands.add_parser("look").add_argument("--round")
    return out


def test_options_are_not_cut_short_and_arguments_may_look_like_them() -> None:
    assert run_command("tool", parser, ["run", "--conf", "x", "--density=0.5"]) == ExitCode.USAGE
    assert run_command("tool", parser, ["run", "--config", "x", "--density=0.5"]) == ExitCode.OK
    with pytest.raises(SystemExit):  # argparse's own verdict on what follows
        run_command("tool", parser, ["run", "--config", "x", "--", "--densty"])


def test_a_word_that_is_nearly_a_command_is_one_unless_a_file_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=r"verfy .*'verify'"):
        check_command("verfy", ["verify", "groups"], "See help.")
    for word in ("verify", "model", "a" * 10_000, "--help"):
        check_command(word, ["verify", "groups"], "See help.")
    (tmp_path / "verfy").write_bytes(b"")
    check_command("verfy", ["verify", "groups"], "See help.")


def test_what_is_printed_as_json_is_json(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"loss": float("nan"), "after": [1.5, float("-inf"), {"steps": 3}], "span": (float("inf"), None, "NaN")})

    def refuse(constant: str) -> None:
        raise ValueError(constant)

    assert json.loads(capsys.readouterr().out, parse_constant=refuse) == {
        "loss": None,
        "after": [1.5, None, {"steps": 3}],
        "span": [None, None, "NaN"],
    }
