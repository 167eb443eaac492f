"""Texts about errors as they may leave the board: no paths, no passwords, no rows of numbers."""

from __future__ import annotations

import re
import sys

from fedprune.core.errors import ConfigError, FedpruneError, PlanError, PrivacyError, ProtocolError, StorageFullError
from fedprune.core.text import one_line

OTHER_MODULE = "(other)"  # in the place of a module that is neither the runtime's nor one that every board has

WITHHELD = "(its words stay on the board, whose samples are in a private job)"

# Errors that are about offers and the board, and not about its samples.
_REPORTABLE_ERRORS = (ConfigError, PlanError, PrivacyError, ProtocolError, StorageFullError)

_OUR_PACKAGES = (
    "fedprune",
    "fedprune_start",
    "fedprune_device",
    "fedprune_export",
    "fedprune_flash",
    "fedprune_server",
)
_COMMON_PACKAGES = frozenset(
    {
        *sys.stdlib_module_names,
        *("numpy", "paho", "safetensors", "cryptography", "msgspec", "onnxruntime", "PIL", "tensorrt"),
    }
)
_URL_USER = re.compile(r"(?<=://)[^/@\s]*@")
_CLAIM = re.compile(r"\bFP1-[A-Za-z0-9-]+")
_PATH = re.compile(r"""(?<![\w:/.])(?:~|\.{0,2})/[^\s'",;:()<>]+|\b[A-Za-z]:\\[^\s'",;]+""")
_FILE_URL = re.compile(r"\bfile://\S+")
_NUMBERS = re.compile(r"[\[(]\s*(?:[-+0-9.eE]+(?:\s*,\s*|\s+)){3,}[-+0-9.eE]*[^\])]{0,400}[\])]?")
_IN_A_PACKAGE = (
    re.compile(r"/(?:site-packages|dist-packages|lib-dynload)/([A-Za-z0-9_]+)"),
    re.compile(r"/python3[0-9.t]*/([A-Za-z0-9_]+)"),
)


def redact(text: str, limit: int) -> str:
    """A text as it may leave the board: one line of at most `limit` characters, without the owner's private data.

    Paths, user names and passwords of addresses, claims, and lists of more than three numbers are left out. It can't
    recognise anything else that an error quotes from samples; the runtime's own errors name shapes and places, not
    values.
    """
    flat = one_line(text, 8 * limit)
    flat = _URL_USER.sub("", flat)
    flat = _FILE_URL.sub("(a path)", flat)
    flat = _CLAIM.sub("(a claim)", flat)
    flat = _PATH.sub("(a path)", flat)
    flat = _NUMBERS.sub("[...]", flat)
    return flat if len(flat) <= limit else f"{flat[: limit - 3]}..."


def error_name(error: BaseException) -> str:
    """The name of an error's class; "an error" for classes of packages that only this board may have."""
    kind = type(error)
    return kind.__name__ if module_of(kind.__module__) != OTHER_MODULE else "an error"


def refusal_reason(error: BaseException, *, private: bool) -> str:
    """The reason why an offer isn't carried out, for the server; without any text that may come from samples of a
    private job."""
    if private and not isinstance(error, _REPORTABLE_ERRORS):
        return f"{error_name(error)} {WITHHELD}"
    return str(error) if isinstance(error, FedpruneError) else f"{type(error).__name__}: {error}"


def module_of(name: str) -> str:
    """A module's name as it may leave the board: our own in full, of well-known packages the package, of others
    nothing."""
    top = name.partition(".")[0]
    if top in _OUR_PACKAGES:
        return name[:128]
    return top if top in _COMMON_PACKAGES and top != "__main__" else OTHER_MODULE


def module_of_file(path: str) -> str:
    """The name of a module's file as it may leave the board, as for `module_of`."""
    path_parts = path.replace("\\", "/").removesuffix(".py").split("/")
    for i in range(len(path_parts) - 1, -1, -1):
        if path_parts[i] in _OUR_PACKAGES:
            names = path_parts[i:]
            return ".".join(names[:-1] if names[-1] == "__init__" else names)[:128]
    match = next((candidate for pattern in _IN_A_PACKAGE if (candidate := pattern.search(path))), None)
    return module_of(match[1]) if match else OTHER_MODULE
