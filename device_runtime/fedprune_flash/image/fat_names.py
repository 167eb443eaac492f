"""Names in a FAT file system: long ones, and the short aliases of eight and three letters that each has beside it.

Source: Microsoft, FAT32 File System Specification, 1.03 (2000), sections on long directory entries.
"""

from __future__ import annotations

from collections.abc import Collection

from fedprune.core.errors import ImageError, shown

MAX_NAME = 255
PER_ENTRY = 13
"""UTF-16 units of a long name that one directory entry holds."""

_FORBIDDEN = frozenset('"*/:<>?\\|')
_SHORT = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789!#$%&'()-@^_`{}~")
_CODEPAGE = "cp850"
_LOWER_BASE, _LOWER_EXTENSION = 0x08, 0x10


def checked_name(name: str) -> str:
    """A long name that may be written.

    Raises:
        ImageError: It is empty or too long, or has a character that FAT forbids, or ends with a dot or a space.
    """
    bad = not name or name in (".", "..") or name[-1] in ". " or name[0] == " "
    if bad or any(c in _FORBIDDEN or ord(c) < 32 or 0xD800 <= ord(c) < 0xE000 for c in name):
        raise ImageError("name of a file", expected="one that FAT allows", got=shown(name))
    if len(name.encode("utf-16-le")) > 2 * MAX_NAME:
        raise ImageError("name of a file", expected=f"at most {MAX_NAME} characters", got=shown(name))
    return name


def folded(name: str) -> str:
    """What two names that are the same to FAT have in common."""
    return "".join(c.upper() if len(c.upper()) == 1 else c for c in name)


def is_short(name: str) -> bool:
    """Whether a name needs no long one beside it: eight and three capital letters."""
    base, dot, extension = name.partition(".")
    return (
        1 <= len(base) <= 8 and len(extension) <= 3 and bool(extension) == bool(dot) and set(base + extension) <= _SHORT
    )


def packed(name: str) -> bytes:
    """A short name as a directory entry holds it: eleven bytes, padded with spaces."""
    base, _, extension = name.partition(".")
    return base.ljust(8).encode("ascii") + extension.ljust(3).encode("ascii")


def unpacked(raw: bytes, case: int) -> str:
    """A short name as people read it.

    Args:
        raw: Eleven bytes.
        case: Byte 12 of the entry: which part Windows NT and Linux show in small letters.
    """
    first = b"\xe5" if raw[0] == 0x05 else raw[:1]  # 0xE5 itself says that an entry is free
    base = (first + raw[1:8]).decode(_CODEPAGE).rstrip(" ")
    extension = raw[8:11].decode(_CODEPAGE).rstrip(" ")
    base = base.lower() if case & _LOWER_BASE else base
    extension = extension.lower() if case & _LOWER_EXTENSION else extension
    return f"{base}.{extension}" if extension else base


def alias(name: str, taken: Collection[bytes]) -> bytes:
    """A short name for a long one that no other entry of the folder has, such as NUMPY-~1.WHL.

    Args:
        name: The long name.
        taken: Short names of the folder, as entries hold them.

    Raises:
        ImageError: A million others are taken.
    """
    stem, dot, extension = name.rpartition(".")
    if not dot or not stem.strip("."):
        stem, extension = name, ""
    base, last = _squeezed(stem) or "_", _squeezed(extension)[:3]
    for number in range(1, 1_000_000):
        tail = f"~{number}"
        found = packed(f"{base[: 8 - len(tail)]}{tail}.{last}")
        if found not in taken:
            return found
    raise ImageError("the folder has no short name left", got=shown(name))


def checksum(short: bytes) -> int:
    """What ties long entries to their short one."""
    total = 0
    for byte in short:
        total = ((total & 1) << 7) + (total >> 1) + byte & 0xFF
    return total


def long_entries(name: str, short: bytes) -> bytes:
    """The directory entries of a long name, the last part first, as they stand before the short one."""
    raw = name.encode("utf-16-le")
    units = len(raw) // 2
    count = -(-units // PER_ENTRY)
    if units % PER_ENTRY:
        raw += b"\0\0"
    raw = raw.ljust(count * PER_ENTRY * 2, b"\xff")
    entries = []
    for index in range(count):
        part = raw[index * PER_ENTRY * 2 :][: PER_ENTRY * 2]
        order = index + 1 | (0x40 if index + 1 == count else 0)
        head = bytes((order,)) + part[:10] + bytes((0x0F, 0, checksum(short)))
        entries.append(head + part[10:22] + b"\0\0" + part[22:26])
    return b"".join(reversed(entries))


def long_part(entry: bytes) -> bytes:
    """The 13 UTF-16 units of a long entry."""
    return entry[1:11] + entry[14:26] + entry[28:32]


def long_name(parts: bytes) -> str | None:
    """A long name from the units of its entries, in order; None where they are damaged."""
    units = [parts[i : i + 2] for i in range(0, len(parts), 2)]
    end = next((i for i, u in enumerate(units) if u == b"\0\0"), len(units))
    try:
        return b"".join(units[:end]).decode("utf-16-le") or None
    except UnicodeDecodeError:
        return None


def _squeezed(text: str) -> str:
    return "".join(c if c in _SHORT else "_" for c in folded(text) if c not in " .")
