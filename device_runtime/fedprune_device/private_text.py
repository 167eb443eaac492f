"""Texts of a board's log as they may leave the board: no paths, no passwords, no rows of numbers."""

from __future__ import annotations

import re
import sys

from fedprune.wire.fields import one_line

OTHER = "(other)"
"""In the place of a module that is neither the runtime's nor one that every board has."""

_OURS = ("fedprune", "fedprune_start", "fedprune_device", "fedprune_export", "fedprune_flash", "fedprune_server")
_KNOWN = frozenset(
    {*sys.stdlib_module_names, "numpy", "paho", "safetensors", "cryptography", "onnxruntime", "PIL", "tensorrt"}
)
_OWNER = re.compile(r"(?<=://)[^/@\s]*@")
_CLAIM = re.compile(r"\bFP1-[A-Za-z0-9-]+")
_PATH = re.compile(r"""(?<![\w:/.])(?:~|\.{0,2})/[^\s'",;:()<>]+|\b[A-Za-z]:\\[^\s'",;]+""")
_FILE_URL = re.compile(r"\bfile://\S+")
_NUMBERS = re.compile(r"[\[(]\s*(?:[-+0-9.eE]+(?:\s*,\s*|\s+)){3,}[-+0-9.eE]*[^\])]{0,400}[\])]?")
_IN_A_PACKAGE = (
    re.compile(r"/(?:site-packages|dist-packages|lib-dynload)/([A-Za-z0-9_]+)"),
    re.compile(r"/python3[0-9.t]*/([A-Za-z0-9_]+)"),
)


def private(text: str, limit: int) -> str:
    """A text as it may be told to the server: one line, without what is the board's owner's alone.

    Paths, user names and passwords of addresses, claims, and lists of more than three numbers are left out. What else
    an error says of samples it can't know; the runtime's own errors name shapes and places, not values.

    Args:
        text: The text.
        limit: Characters that it may have.
    """
    flat = one_line(text, 8 * limit)
    flat = _OWNER.sub("", flat)
    flat = _FILE_URL.sub("(a path)", flat)
    flat = _CLAIM.sub("(a claim)", flat)
    flat = _PATH.sub("(a path)", flat)
    flat = _NUMBERS.sub("[...]", flat)
    return flat if len(flat) <= limit else f"{flat[: limit - 3]}..."


def module_of(name: str) -> str:
    """A module's name as it may be told: our own in full, of well-known packages the package, of others nothing."""
    top = name.partition(".")[0]
    if top in _OURS:
        return name[:128]
    return top if top in _KNOWN and top != "__main__" else OTHER


def module_at(path: str) -> str:
    """The same for a module's file."""
    parts = path.replace("\\", "/").removesuffix(".py").split("/")
    for i in range(len(parts) - 1, -1, -1):
        if parts[i] in _OURS:
            names = parts[i:]
            return ".".join(names[:-1] if names[-1] == "__init__" else names)[:128]
    found = next((f for pattern in _IN_A_PACKAGE if (f := pattern.search(path))), None)
    return module_of(found[1]) if found else OTHER
