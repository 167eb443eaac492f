"""The owner of a state directory: a file in it names device and site, once the device is in its fleet."""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass
from pathlib import Path

from fedprune.core import atomic_file
from fedprune.core.errors import StorageError, value_text

OWNER_FILE = "device.json"

_LOG = logging.getLogger("fedprune.device")

_MAX_NAME_LENGTH = 64  # characters of a name of device or site

_SERVER_FILES = ("server.db", "identity/authority.key")  # what only a server's state folder has


@dataclass(frozen=True)
class DirectoryOwner:
    device: str
    site: str

    def check(self, root: Path) -> None:
        """Refuse another device's, another site's or a server's directory; one without an owner may be taken."""
        for name in _SERVER_FILES:
            if (root / name).exists():
                raise StorageError(
                    f"{root} is the state folder of a server",
                    expected=f"one of device {self.device}'s own",
                    got=f"a folder with {name}",
                    hint="Use another --state.",
                )
        owner = _read(root)
        device, site = owner.get("device"), owner.get("site")
        if not owner or (device, site) == (self.device, self.site):
            return
        raise StorageError(
            f"{root} is the state directory of another device",
            expected=f"device {self.device} of site {self.site}",
            got=f"device {_name_text(device)} of site {_name_text(site)}",
            hint="Use its --device and --site, or another --state; delete the directory to start over.",
        )

    def owns(self, root: Path) -> bool:
        """Whether this device has taken part in its fleet with this directory."""
        return _read(root) == asdict(self)

    def claim(self, root: Path) -> None:
        self.check(root)
        if _read(root) != asdict(self):
            atomic_file.write_document(root / OWNER_FILE, asdict(self))


def check_unowned(root: Path) -> None:
    """Refuse a device's directory as a server's state folder."""
    if (root / OWNER_FILE).exists():
        raise StorageError(
            f"{root} is the state directory of a device",
            expected="a folder of the server's own",
            got=f"one with {OWNER_FILE}",
            hint="Give another --state.",
        )


def _read(root: Path) -> dict[str, object]:
    try:
        return atomic_file.read_document(root / OWNER_FILE) or {}
    except StorageError as error:
        _LOG.warning("%s: its owner is no longer known", error)
        return {}


def _name_text(value: object) -> str:
    is_name = isinstance(value, str) and value.isprintable() and len(value) <= _MAX_NAME_LENGTH
    return str(value) if is_name else value_text(value)
