"""Errors of commands: one line on stderr and the right exit code, tracebacks only on request."""

from __future__ import annotations

import argparse
import errno
import json
import signal
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from fedprune.core.cli import (
    DEBUG,
    check_command,
    ended_by_signals,
    hours,
    print_json,
    run_command,
    seconds,
    whole_number,
    with_extra,
)
from fedprune.core.errors import (
    BrokerError,
    ConfigError,
    ExitCode,
    ModelError,
    PlanError,
    RuntimeUnavailableError,
    StorageFullError,
    UsageError,
)
from fedprune.output.extras import install_command

pytestmark = pytest.mark.board


def command(action: Callable[[], Any]) -> int:
    def build() -> argparse.ArgumentParser:
        parser = argparse.ArgumentParser(prog="tool")
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
        (ModelError("bad model"), ExitCode.MODEL),
        (PlanError("no width"), ExitCode.PLAN),
        (BrokerError("no broker"), ExitCode.BROKER),
        (StorageFullError("full"), ExitCode.STORAGE_FULL),
        (OSError(errno.ENOSPC, "No space left on device", "x"), ExitCode.STORAGE_FULL),
        (PermissionError(errno.EACCES, "Permission denied", "x"), ExitCode.STORAGE),
        (MemoryError(), ExitCode.INTERNAL),
        (ZeroDivisionError("oops"), ExitCode.INTERNAL),
        (OSError("strange"), ExitCode.INTERNAL),
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), ExitCode.INTERNAL),
    ],
)
def test_errors_are_one_line_and_a_code(
    error: BaseException, code: ExitCode, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(DEBUG, raising=False)

    assert command(failing(error)) == code

    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1


def by(error: BaseException, cause: BaseException) -> BaseException:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "said"),
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
def test_an_interruption_is_no_error(error: BaseException, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(failing(error)) == ExitCode.INTERRUPTED
    assert capsys.readouterr().err == said


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_a_command_like_ctrl_c(number: signal.Signals) -> None:
    before = signal.getsignal(number)

    def action() -> None:
        with ended_by_signals():
            signal.raise_signal(number)
            pytest.fail("it went on")

    assert command(action) == ExitCode.INTERRUPTED
    assert signal.getsignal(number) is before


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["look", "--number", "x"], "argument --number: expected a whole number, got 'x'. See `tool look --help`.\n"),
        (
            ["look", "--number", "1", "--share", "x"],
            "argument --share: expected a number, got 'x'. See `tool look --help`.\n",
        ),
        (
            ["look", "--number", f"{2**70}"],
            f"argument --number: expected a whole number of at most 64 bits, got '{2**70}'. See `tool look --help`.\n",
        ),
        *(
            (
                ["look", "--number", "1", "--share", text],
                f"argument --share: expected a finite number, got '{text}'. See `tool look --help`.\n",
            )
            for text in ("nan", "inf", "1e999")
        ),
        (["look"], "the following arguments are required: --number. See `tool look --help`.\n"),
        (["look", "--number", "1", "more"], "unrecognized arguments: more. See `tool --help`.\n"),
        ([], "the following arguments are required: COMMAND. See `tool --help`.\n"),
    ],
)
def test_a_usage_error_is_one_line(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    def build() -> argparse.ArgumentParser:
        parser = argparse.ArgumentParser(prog="tool")
        commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
        look = commands.add_parser("look")
        look.add_argument("--number", type=int, required=True)
        look.add_argument("--share", type=float)
        return parser

    with pytest.raises(SystemExit) as caught:
        run_command("tool", build, words)
    assert caught.value.code == ExitCode.USAGE
    assert capsys.readouterr().err == f"error: {said}"


def test_help_of_a_command_says_what_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    def build() -> argparse.ArgumentParser:
        parser = argparse.ArgumentParser(prog="tool")
        commands = parser.add_subparsers(dest="command", required=True)
        commands.add_parser("look", help="look at a board")
        inner = commands.add_parser("make", help="make things").add_subparsers(required=True)
        inner.add_parser("kit", help="make a kit", description="Make a folder of wheels.")
        return parser

    def help_of(*words: str) -> str:
        with pytest.raises(SystemExit):
            run_command("tool", build, [*words, "--help"])
        return capsys.readouterr().out

    assert "\n\nLook at a board.\n\n" in help_of("look")
    assert "\n\nMake things.\n\n" in help_of("make")
    assert "\n\nMake a folder of wheels.\n\n" in help_of("make", "kit")


def test_what_the_system_refuses_comes_with_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    assert command(failing(PermissionError(errno.EACCES, "Permission denied", "x"))) == ExitCode.STORAGE
    assert capsys.readouterr().err.startswith("error: Permission denied: x. Let this user")


def test_a_message_of_several_lines_becomes_one(capsys: pytest.CaptureFixture[str]) -> None:
    command(failing(ModelError("first\nsecond")))

    assert capsys.readouterr().err == "error: first second\n"


def test_the_unexpected_asks_for_a_report(capsys: pytest.CaptureFixture[str]) -> None:
    command(failing(ZeroDivisionError("oops")))

    err = capsys.readouterr().err
    assert "ZeroDivisionError: oops" in err
    assert "report" in err
    assert DEBUG in err


def test_debug_shows_the_traceback(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(DEBUG, "1")

    command(failing(ModelError("bad model")))

    err = capsys.readouterr().err
    assert "Traceback" in err
    assert err.endswith("error: bad model\n")


def test_success_passes_the_code_on() -> None:
    assert command(lambda: ExitCode.OK) == 0
    assert command(lambda: 3) == 3


def test_a_failing_parser_is_handled_too(capsys: pytest.CaptureFixture[str]) -> None:
    def build() -> argparse.ArgumentParser:
        raise ModelError("early")

    assert run_command("tool", build, []) == ExitCode.MODEL
    assert capsys.readouterr().err == "error: early\n"


def test_a_missing_package_names_the_extra(capsys: pytest.CaptureFixture[str]) -> None:
    def run(arguments: argparse.Namespace) -> int:
        raise ModuleNotFoundError("No module named 'onnx'", name="onnx")

    assert command(lambda: with_extra("server", run)(argparse.Namespace())) == ExitCode.MISSING_EXTRA
    assert f"needs onnx, which is not installed. {install_command('server')}" in capsys.readouterr().err


def test_a_module_of_our_own_is_no_missing_extra(capsys: pytest.CaptureFixture[str]) -> None:
    def run(arguments: argparse.Namespace) -> int:
        raise ModuleNotFoundError("No module named 'fedprune.lost'", name="fedprune.lost")

    assert command(lambda: with_extra("server", run)(argparse.Namespace())) == ExitCode.INTERNAL
    assert "fedprune.lost" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("kind", "text"),
    [(whole_number, t) for t in ("0", "-4", "1.5", "many", str(2**63), "9" * 5000)]
    + [(kind, t) for kind in (seconds, hours) for t in ("0", "-1", "inf", "nan", "soon", "1e300")],
)
def test_a_number_out_of_range_is_refused_in_words(kind: Callable[[str], object], text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=rf"above 0.*, got '{text}'"):
        kind(text)


def test_numbers_in_range_are_read() -> None:
    assert (whole_number("12"), seconds("0.5")) == (12, 0.5)


def parser() -> argparse.ArgumentParser:
    out = argparse.ArgumentParser(prog="tool")
    out.add_argument("--version", action="version", version="1")
    commands = out.add_subparsers(required=True)
    run = commands.add_parser("run")
    run.add_argument("--config", required=True)
    run.add_argument("--density", type=float)
    run.set_defaults(run=lambda arguments: arguments.density != 0.5)
    commands.add_parser("look").add_argument("--round")
    return out


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (
            "run --config x --densty 0.5",
            "there is no option --densty (did you mean '--density'?). See `tool run --help`.",
        ),
        ("run --confg=x", "there is no option --confg (did you mean '--config'?). See `tool run --help`."),
        ("run --config x --round 3", "there is no option --round. See `tool run --help`."),
        ("--verson", "there is no option --verson (did you mean '--version'?). See `tool --help`."),
    ],
)
def test_a_misspelt_option_is_one_line_with_what_was_meant(
    line: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command("tool", parser, line.split()) == ExitCode.USAGE
    assert capsys.readouterr().err == f"error: {said}\n"


def test_options_are_not_cut_short_and_arguments_may_look_like_them() -> None:
    assert run_command("tool", parser, ["run", "--conf", "x", "--density=0.5"]) == ExitCode.USAGE
    assert run_command("tool", parser, ["run", "--config", "x", "--density=0.5"]) == ExitCode.OK
    with pytest.raises(SystemExit):  # argparse's own verdict on what follows
        run_command("tool", parser, ["run", "--config", "x", "--", "--densty"])


@pytest.mark.parametrize(
    ("line", "end"),
    [
        ("lok --round 3", ": invalid choice: 'lok' (did you mean 'look'?). See `tool --help`.\n"),
        ("zzz --config", "look). See `tool --help`.\n"),
    ],
)
def test_a_misspelt_command_comes_with_the_one_that_was_meant(
    line: str, end: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        run_command("tool", parser, line.split())
    assert caught.value.code == ExitCode.USAGE
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert f"invalid choice: '{line.split()[0]}'" in said
    assert said.replace("'look')", "look)").endswith(end)


def test_a_module_of_ours_that_is_missing_is_an_incomplete_installation(capsys: pytest.CaptureFixture[str]) -> None:
    def run(arguments: argparse.Namespace) -> int:
        import_module("fedprune.no_such_module")
        return 0

    def build() -> argparse.ArgumentParser:
        out = argparse.ArgumentParser()
        out.set_defaults(run=run)
        return out

    assert run_command("tool", build, []) == ExitCode.INTERNAL
    said = capsys.readouterr().err
    assert "installation is incomplete (No module named 'fedprune.no_such_module')" in said
    assert "run the command again" in said
    assert "report" not in said


def test_a_word_that_is_nearly_a_command_is_one_unless_a_file_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=r"there is no command verfy \(did you mean 'verify'\?\)\. See help"):
        check_command("verfy", ["verify", "groups"], "See help.")
    for word in ("verify", "model", "a" * 10_000, "--help"):
        check_command(word, ["verify", "groups"], "See help.")
    (tmp_path / "verfy").write_bytes(b"")
    check_command("verfy", ["verify", "groups"], "See help.")


@pytest.mark.parametrize(("setting", "begins"), [({}, "\x1b[1;31merror:\x1b[0m "), ({"NO_COLOR": "1"}, "error: ")])
def test_on_a_terminal_an_error_is_red(
    setting: dict[str, str], begins: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    for name, value in setting.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)

    def failing(_: argparse.Namespace) -> int:
        raise ConfigError("wrong")

    def build() -> argparse.ArgumentParser:
        parser = argparse.ArgumentParser(prog="fedprune-x")
        parser.set_defaults(run=failing)
        return parser

    assert run_command("fedprune-x", build, []) == ExitCode.CONFIG
    assert capsys.readouterr().err == f"{begins}wrong\n"


def test_what_is_printed_as_json_is_json(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"loss": float("nan"), "after": [1.5, float("-inf"), {"steps": 3}], "span": (float("inf"), None, "NaN")})

    def refuse(constant: str) -> None:
        raise ValueError(constant)

    assert json.loads(capsys.readouterr().out, parse_constant=refuse) == {
        "loss": None,
        "after": [1.5, None, {"steps": 3}],
        "span": [None, None, "NaN"],
    }
