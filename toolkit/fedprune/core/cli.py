"""Error handling of all commands: errors become one line and an exit code, never a traceback.

A command's parser gives every subcommand a default `run`, which is a `Command`.
"""

from __future__ import annotations

import argparse
import errno
import json
import math
import os
import re
import select
import signal
import sys
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar, cast

from fedprune.core.command_parser import DEBUG_VARIABLE, CommandParser, print_error
from fedprune.core.errors import ExitCode, FedpruneError, MissingExtraError, UsageError, did_you_mean, path_remedy
from fedprune.core.text import sentences
from fedprune.core.validation import MAX_INT

# A subcommand: takes the parsed arguments and returns an exit code. None is 0, so that most commands need no return.
Command = Callable[[argparse.Namespace], int | None]

Options = TypeVar("Options")

# Eleven days: poll(2) takes milliseconds in 32 bits.
_MAX_SECONDS = 1e6

# A century: not every library can show a date that is further from now.
_MAX_HOURS = 100 * 365 * 24.0

# A quota that is used up looks like a full disk to whoever has to solve it.
_DISK_FULL_ERRNOS = frozenset({errno.ENOSPC, errno.EDQUOT})


def run_command(prog: str, build_parser: Callable[[], CommandParser], argv: Sequence[str] | None = None) -> int:
    """Parse the command line, run what it asks for and return the exit code; argparse may end the process with
    `SystemExit`."""
    try:
        arguments = build_parser().parse_args(argv)
        code = int(arguments.run(arguments) or ExitCode.OK)
        sys.stdout.flush()  # a pipe that is closed fails here, inside the try, and not when the interpreter ends
        return code
    except BrokenPipeError as error:
        if not _has_reader_ended():
            return _report_internal_error(prog, error)
        # The reader has ended (`| head`). The buffered rest goes nowhere: else the interpreter's own flush would fail
        # again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return int(ExitCode.OK)
    except KeyboardInterrupt as error:  # no error: the user wanted it
        return _report_interrupt(error)
    except FedpruneError as error:
        if (interruption := _interrupt_behind(error)) is not None:
            return _report_interrupt(interruption)
        print_error(str(error))
        return int(error.exit_code)
    except ImportError as error:
        # If a module of fedprune is missing, pip is changing the installation; any other import error is unexpected.
        if not (error.name or "").startswith("fedprune"):
            return _report_internal_error(prog, error)
        print_error(
            f"fedprune's installation is incomplete ({error}). If pip is at work on it, run the command again when "
            "that is done; otherwise install fedprune again."
        )
        return int(ExitCode.INTERNAL)
    except OSError as error:
        if error.errno in _DISK_FULL_ERRNOS:
            print_error(f"no room left on the disk{_path_suffix(error)}. Free some and run the command again.")
            return int(ExitCode.STORAGE_FULL)
        if error.strerror is None:  # raised by a library, not by the operating system
            return _report_internal_error(prog, error)
        print_error(sentences(f"{error.strerror}{_path_suffix(error)}", path_remedy(error)))
        return int(ExitCode.STORAGE)
    except MemoryError:
        print_error("not enough memory on this machine")
        return int(ExitCode.INTERNAL)
    except Exception as error:  # noqa: BLE001  the last line of defence: a user never sees a bare traceback
        return _report_internal_error(prog, error)


def _has_reader_ended() -> bool:
    """Whether the reader of stdout or stderr has ended; if not, another pipe broke, which is an error."""
    output = select.poll()
    for descriptor in (1, 2):
        output.register(descriptor, 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in output.poll(0))


def _report_interrupt(error: KeyboardInterrupt) -> int:
    print(f"interrupted: {error}" if str(error) else "interrupted", file=sys.stderr)
    return int(ExitCode.INTERRUPTED)


def _interrupt_behind(error: BaseException) -> KeyboardInterrupt | None:
    """The Ctrl-C that caused an error, if any: compiled modules turn one during their import into an ImportError."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error if isinstance(error, KeyboardInterrupt) else None


def with_extra(extra: str, run: Command) -> Command:
    """Wrap a command so that a missing package becomes an error that names the extra to install.

    `run` has to import the package when it is called.
    """

    def run_or_name_extra(arguments: argparse.Namespace) -> int | None:
        try:
            return run(arguments)
        except ModuleNotFoundError as error:
            if (error.name or "").startswith("fedprune"):  # no extra would install it
                raise
            raise MissingExtraError(f"this command needs {error.name}, which is not installed", extra=extra) from error

    return run_or_name_extra


def imported_command(module: str, name: str) -> Command:
    """The command that is a function of a module, which is imported only when the command runs: a program's help, its
    completion and its usage errors must not wait for all that its commands need."""

    def run(arguments: argparse.Namespace) -> int | None:
        function: Command = getattr(import_module(module), name)
        return function(arguments)

    return run


def options_of(kind: Callable[..., Options], arguments: argparse.Namespace, /, **extra_fields: Any) -> Options:
    """Build a dataclass from the options whose names are its fields, and from `extra_fields`."""
    field_names = {field.name for field in fields(cast(Any, kind))}
    return kind(**{**{name: value for name, value in vars(arguments).items() if name in field_names}, **extra_fields})


def add_json_option(parser: argparse.ArgumentParser, text: str = "as JSON, for programs") -> None:
    """Give a command that prints a result the option `--json`."""
    parser.add_argument("--json", action="store_true", help=text)


def print_json(value: Any) -> None:
    """Print JSON with its keys in their given order. NaN and infinities, which JSON lacks, become null."""
    print(json.dumps(_without_infinities(value), indent=2, allow_nan=False))


def _without_infinities(value: Any) -> Any:
    """A value for JSON with None in place of numbers that are not finite."""
    if isinstance(value, dict):
        return {key: _without_infinities(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_infinities(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def positive_integer(text: str) -> int:
    """A number of an option: whole and above 0."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if not 1 <= value <= MAX_INT:
        raise argparse.ArgumentTypeError(f"expected a whole number above 0, of at most 64 bits, got {text!r}")
    return value


def byte_count(text: str) -> int:
    """Bytes of an option, such as 200MB, 1.5GB or 200000000; powers of 1000."""
    units = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}
    match = re.fullmatch(r"([0-9]{1,15}(?:\.[0-9]{1,9})?) ?([KMG]?B?)", text.strip(), re.IGNORECASE)
    value = round(float(match[1]) * units.get(match[2].upper(), 0)) if match else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected bytes, such as 200MB or 1.5GB, got {text!r}")
    return value


def setting_of(kind: Callable[[str], Any]) -> Callable[[str], Any]:
    """The type of an option for a setting that a file can hold as well.

    Text that is no number stays text: the check of the settings then refuses it with the same message as in a file.
    """

    def parse_value(text: str) -> Any:
        try:
            return kind(text)
        except ValueError:
            return text

    return parse_value


def recipe_setting(lists: Collection[str]) -> Callable[[str], tuple[str, Any]]:
    """The type of an option `KEY=VALUE`, such as lr=0.01: the value is JSON, or otherwise text.

    The value of a key in `lists` is a list, which may be given with commas.
    """

    def parse_setting(text: str) -> tuple[str, Any]:
        key, equals, value = text.partition("=")
        if not key or not equals:
            raise argparse.ArgumentTypeError(f"expected KEY=VALUE, such as lr=0.01, got {text!r}")
        setting = _json_or_text(value)
        if key not in lists or isinstance(setting, list):
            return key, setting
        return key, [_json_or_text(p.strip()) for p in setting.split(",")] if isinstance(setting, str) else [setting]

    return parse_setting


def _json_or_text(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _positive_number(text: str, unit: str = "", upper_limit: float = sys.float_info.max) -> float:
    """A number of an option: finite, above 0 and up to a limit."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= upper_limit:
        limit = "" if upper_limit == sys.float_info.max else f" and at most {upper_limit:g}"
        kind = f"a number of {unit}" if unit else "a number"
        raise argparse.ArgumentTypeError(f"expected {kind} above 0{limit}, got {text!r}")
    return value


positive_rate = _positive_number
positive_joules = partial(_positive_number, unit="joules")
positive_hours = partial(_positive_number, unit="hours", upper_limit=_MAX_HOURS)
positive_seconds = partial(_positive_number, unit="seconds", upper_limit=_MAX_SECONDS)


@contextmanager
def signals_as_interrupts() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end a command as Ctrl-C does, with all cleanup."""
    if threading.current_thread() is not threading.main_thread():  # Python lets no other thread set signal handlers
        yield
        return

    def raise_interrupt(_number: int, _frame: object) -> None:
        raise KeyboardInterrupt

    previous_handlers = {s: signal.signal(s, raise_interrupt) for s in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for signal_number, handler in previous_handlers.items():
            signal.signal(signal_number, handler)


def check_command(word: str, commands: Iterable[str], hint: str) -> None:
    """Refuse a first word that is nearly the name of a command, unless a file has that name. Raises `UsageError`.

    Commands whose first word is a file would otherwise report that the file `statsu` is missing.
    """
    suggestion = did_you_mean(word, commands)
    if suggestion and word not in commands and not Path(word).exists():
        raise UsageError(f"there is no command {word[:60]}{suggestion}", hint=hint)


def _report_internal_error(prog: str, error: Exception) -> int:
    kind = type(error).__name__
    print_error(
        f"{prog} failed with an unexpected error ({kind}: {error}). "
        f"Please report it, with the output of the same command under {DEBUG_VARIABLE}=1."
    )
    return int(ExitCode.INTERNAL)


def _path_suffix(error: OSError) -> str:
    return f": {error.filename}" if error.filename else ""
