"""Every error that fedprune raises on purpose, and the exit code with which a command ends on it.

A message names what was wrong, what was expected, what was found and what to do. `docs/exit-codes.md` has a
paragraph for each code.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from enum import IntEnum
from pathlib import Path

from fedprune.core.text import sentences
from fedprune.output.extras import install_command

# Longer names are not compared for misspellings: difflib takes time by the square, and the name may be received text.
_MAX_COMPARED_NAME = 60

# Characters of each part of a message: received input may be long, and errors end up in logs.
_MAX_PART_LENGTH = 1000

# `difflib`'s ratio from which a name may be a misspelling: with its default of 0.6 shop resembles shape.
_MIN_SIMILARITY = 0.75

# TOML's bare keys; other keys are shown quoted, so that a key with a dot in it isn't taken for two.
_BARE_KEY = re.compile(r"[A-Za-z0-9_-]{1,60}")

# The keys of a setting from the outermost table, such as `("job", "recipe", "lr")`; items of lists count from 0.
KeyPath = tuple[str | int, ...]

# What an error is about: a setting by its path, anything else in words.
Subject = str | KeyPath


class ExitCode(IntEnum):
    """Exit codes of all commands, in ranges by what failed."""

    OK = 0
    INTERNAL = 1
    USAGE = 2
    MISSING_EXTRA = 3
    INTERRUPTED = 4
    CLAIM = 5
    FINDINGS = 6
    MODEL = 10
    BUNDLE = 11
    PROFILE = 12
    DATA = 13
    CONFIG = 14
    BROKER = 20
    PROTOCOL = 21
    CLUSTER = 22
    OTHER_SERVER = 23
    NOTIFICATION = 24
    STORAGE_FULL = 30
    STORAGE = 31
    PLAN = 40
    PRIVACY = 41
    TRAINING = 50
    RUNTIME = 51
    ENGINE = 52
    DIVERGED = 53
    KIT = 60
    IMAGE = 61
    IDENTITY = 63
    JOIN = 64
    RELEASE = 65
    BOARD = 66


class FedpruneError(Exception):
    """Base of all errors raised on purpose.

    Args:
        what: The problem, naming the thing; or the path of a setting, which the message names as `job.recipe.lr`.
        path: The setting, where `what` says more about it.
        expected: A valid value.
        got: The value that was given.
        hint: A remedy for the user.
    """

    exit_code = ExitCode.INTERNAL

    def __init__(
        self, what: Subject, *, path: KeyPath = (), expected: object = None, got: object = None, hint: str = ""
    ) -> None:
        self.path = path or (what if isinstance(what, tuple) else ())
        self.description = what if isinstance(what, str) else ""
        self.what = what = ": ".join(text for text in (dotted_path(self.path), self.description) if text)
        self.expected = expected
        self.got = got
        self.hint = hint
        clauses = [_short_text(what)]
        if expected is not None:
            clauses.append(f"expected {_short_text(expected)}")
        if got is not None:
            clauses.append(f"got {_short_text(got)}")
        message = ": ".join(clauses[:1]) + (": " + ", ".join(clauses[1:]) if clauses[1:] else "")
        super().__init__(sentences(message, hint))

    def with_subject(self, what: str, path: KeyPath = ()) -> FedpruneError:
        """The same error about a thing under another name, or a setting with another path."""
        # Subclasses have initialisers of their own, whose further arguments are attributes by now.
        error = type(self).__new__(type(self))
        vars(error).update(vars(self))
        FedpruneError.__init__(error, what, path=path, expected=self.expected, got=self.got, hint=self.hint)
        return error


def dotted_path(path: KeyPath) -> str:
    """A path as messages show it, such as `job.recipe.lr` or `devices[1].profile`."""
    keys = (
        f"[{key}]" if isinstance(key, int) else f".{key if _BARE_KEY.fullmatch(key) else value_text(key)}"
        for key in path
    )
    return "".join(keys).removeprefix(".")


def _short_text(value: object) -> str:
    try:
        text = str(value)
    except ValueError:  # an integer with more digits than Python converts
        text = value_text(value)
    return text if len(text) <= _MAX_PART_LENGTH else f"{text[:_MAX_PART_LENGTH]}..."


def value_text(value: object) -> str:
    """A received value as an error shows it: short, on one line, without control characters."""
    # Python refuses to print integers of more than some 4,300 digits; received ones may have them.
    if isinstance(value, int) and value.bit_length() > 200:
        return f"a number of {value.bit_length()} bits"
    if isinstance(value, (str, bytes)):
        text = repr(value[:60])
        return text if len(value) <= 60 else f"{text}... of length {len(value)}"
    if isinstance(value, (list, tuple, Mapping)):
        return f"{'table' if isinstance(value, Mapping) else 'list'} of length {len(value)}"
    return repr(value)[:80]


def shape_text(*sizes: object) -> str:
    """A shape as messages show it, such as [n, 3, 32, 32]."""
    return f"[{', '.join(map(str, sizes))}]"


def error_reason(error: BaseException) -> str:
    """The first line of another library's error, shortened, without terminal escape codes."""
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", str(error)).strip() or type(error).__name__
    return "".join(c if c.isprintable() else " " for c in text.splitlines()[0][:200]).strip()


# Our settings by the names that other frameworks have for them, which no comparison of letters would find.
_SYNONYMS = {
    "learning_rate": "lr",
    "local_epochs": "epochs",
    "l2": "weight_decay",
    "mu": "proximal",
    "clients": "devices",
    "num_rounds": "rounds",
}


def did_you_mean(name: object, candidates: Iterable[str]) -> str:
    """A suggestion for an unknown name, as " (did you mean 'x'?)"; empty if no known name is similar."""
    if not isinstance(name, str):
        return ""
    names = list(candidates)
    near = [_SYNONYMS[name]] if _SYNONYMS.get(name) in names else []
    if len(name) <= _MAX_COMPARED_NAME:
        names_by_lower_case = {known_name.lower(): known_name for known_name in names}
        near = near or [
            names_by_lower_case[match]
            for match in get_close_matches(name.lower(), names_by_lower_case, 1, _MIN_SIMILARITY)
        ]
    return f" (did you mean {near[0]!r}?)" if near else ""


_REMEDIES = {
    errno.ENOENT: "Check the path, or choose another.",
    errno.EACCES: "Let this user read and write there, or choose another place.",
    errno.EPERM: "Let this user read and write there, or choose another place.",
    errno.EROFS: "Choose a place that can be written to.",
    errno.ENOTDIR: "A part of the path is a file: choose another folder.",
    errno.EEXIST: "There is a file of that name: choose another folder.",
    errno.EISDIR: "That is a folder: name a file.",
    errno.ENAMETOOLONG: "Choose a shorter name.",
    errno.EFBIG: "No file may be so large there: choose another disk, or raise the limit (ulimit -f).",
}


def search_location(path: Path | str) -> str:
    """A sentence with the absolute path of a missing file or folder, after a space; empty if the path is absolute."""
    return "" if Path(path).is_absolute() else f" It was looked for at {Path(path).absolute()}."


def path_remedy(error: OSError | EOFError, hint: str = "") -> str:
    """The remedy for a path that the operating system refuses: `hint`, or the usual one; empty if there is none."""
    advice = hint or _REMEDIES.get(getattr(error, "errno", None) or 0, "")
    path = getattr(error, "filename", None)
    if isinstance(error, FileNotFoundError) and isinstance(path, (str, Path)):
        return f"{advice}{search_location(path)}"
    return advice


class UsageError(FedpruneError):
    """A command line can't be followed, which shows only after it was parsed."""

    exit_code = ExitCode.USAGE


class MissingExtraError(FedpruneError):
    """A command needs a package of an extra that is not installed; how to install the extra ends the message."""

    exit_code = ExitCode.MISSING_EXTRA

    def __init__(self, what: str, *, extra: str = "", hint: str = "") -> None:
        super().__init__(
            what, hint=" ".join(sentence for sentence in (hint, install_command(extra) if extra else "") if sentence)
        )


class ModelError(FedpruneError):
    """A model file or graph is damaged, or uses what fedprune can't handle."""

    exit_code = ExitCode.MODEL


class BundleError(FedpruneError):
    """A bundle, submodel, selection or architecture file is damaged or contradicts the others."""

    exit_code = ExitCode.BUNDLE


class ProfileError(FedpruneError):
    """A hardware profile or probe report is invalid."""

    exit_code = ExitCode.PROFILE


class UnknownProfileError(ProfileError):
    """There is no hardware profile of that name."""


class DataError(FedpruneError):
    """Training or prediction data can't be used."""

    exit_code = ExitCode.DATA


class ConfigError(FedpruneError):
    """A job, recipe or server setting is invalid."""

    exit_code = ExitCode.CONFIG


class StrategyError(ConfigError):
    """A user's strategy fails, or one of its roles returns an invalid result; the message names file and line."""


class BrokerError(FedpruneError):
    """The MQTT broker can't be reached or refuses the connection."""

    exit_code = ExitCode.BROKER


class ProtocolError(FedpruneError):
    """A message or blob from the network violates the protocol."""

    exit_code = ExitCode.PROTOCOL


class OutOfRangeError(ProtocolError):
    """Weights are finite, but far too large: training may have diverged."""


class UnknownMessageError(ProtocolError):
    """A message is of an unknown type: the peer may be of another version."""


class SignatureError(ProtocolError):
    """A message is unsigned, signed by another key or for another topic, or was changed in transit."""


class ReplayError(ProtocolError):
    """A signed message was received before, or is too old to know."""


class StaleEpochError(ReplayError):
    """A signed message is of an epoch that is over here, which its sender may not know
    (`fedprune.security.signed_channel`)."""


class TwoSignersError(StaleEpochError):
    """A signed message is of a past epoch but was never received: two senders use the same key."""


class StorageError(FedpruneError):
    """A file or folder is damaged, unreadable or another program's.

    Any function that reads or writes files may raise it, or its subclass `StorageFullError` if the disk is full.
    Docstrings name it only if there is more to say.
    """

    exit_code = ExitCode.STORAGE


class BusyError(StorageError):
    """Another process holds a lock."""


class StorageFullError(StorageError):
    """There is no room left on the disk; what was there before is untouched."""

    exit_code = ExitCode.STORAGE_FULL


class PlanError(FedpruneError):
    """No width of the model fits a board's limits."""

    exit_code = ExitCode.PLAN


class PrivacyError(FedpruneError):
    """An offer is less private than the board's owner asks for, or its budget of privacy is spent."""

    exit_code = ExitCode.PRIVACY


class TrainingError(FedpruneError):
    """Local training failed: numbers that are not finite, or graph and weights that don't match."""

    exit_code = ExitCode.TRAINING


class DivergedError(TrainingError):
    """Local training ended in numbers that are not finite."""

    exit_code = ExitCode.DIVERGED


class RuntimeUnavailableError(FedpruneError):
    """onnxruntime can't be loaded on this machine."""

    exit_code = ExitCode.RUNTIME


class EngineError(FedpruneError):
    """A TensorRT engine can't be made or used here, or doesn't compute what onnxruntime computes."""

    exit_code = ExitCode.ENGINE


class KitError(FedpruneError):
    """A kit for a board is damaged, incomplete or for another board."""

    exit_code = ExitCode.KIT


class ImageError(FedpruneError):
    """A disk image is not what can be customised: its kind, partitions, file system or scheme."""

    exit_code = ExitCode.IMAGE


class IdentityError(FedpruneError):
    """A key, certificate or revocation list can't be used, or may not be made."""

    exit_code = ExitCode.IDENTITY


class JoinError(FedpruneError):
    """A device can't join, or a server's answer to it can't be believed."""

    exit_code = ExitCode.JOIN


class ReleaseError(FedpruneError):
    """A release of the runtime is damaged, not signed as it must be, or doesn't fit this board."""

    exit_code = ExitCode.RELEASE


class BoardSetupError(FedpruneError):
    """A board is not the one that was meant, or its service doesn't run."""

    exit_code = ExitCode.BOARD
