"""The installer in a kit: one file of the modules that run on a board, including those of its slots."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

from fedprune.core import errors
from fedprune.output import extras
from fedprune_device.launcher import ed25519, slot_store, state
from fedprune_device.releases import wheel
from fedprune_flash.on_board import (
    board_files,
    install,
    installation,
    kit_folder,
    runtime_slot,
    service_control,
)

INSTALLER = "install.pyz"

_MODULES = (
    *(errors, extras, ed25519, slot_store, state, wheel),
    *(board_files, install, installation, kit_folder, runtime_slot, service_control),
)
_MAIN = "import sys\nfrom fedprune_flash.on_board.install import main\nsys.exit(main())\n"


def installer_archive() -> bytes:
    """The archive that `python3 install.pyz` runs; the same bytes every time."""
    names = {m.__name__ for m in _MODULES}
    packages = {name.rsplit(".", n)[0] for name in names for n in range(1, name.count(".") + 1)}
    files = {f"{p.replace('.', '/')}/__init__.py": b"" for p in sorted(packages)}  # the packages' own import much more
    files |= {f"{m.__name__.replace('.', '/')}.py": Path(str(m.__file__)).read_bytes() for m in _MODULES}
    files["__main__.py"] = _MAIN.encode()
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        for name, content in files.items():
            archive.writestr(zipfile.ZipInfo(name), content)
    return data.getvalue()
