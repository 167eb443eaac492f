"""The installer in a kit: one file of the modules that run on a board, those of the board's slots among them."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

from fedprune import errors, extras
from fedprune_device.runtime import ed25519, home, state, wheel
from fedprune_flash.on_board import (
    board_files,
    install,
    installation,
    kit_folder,
    runtime_slot,
    service_control,
)

INSTALLER = "install.pyz"

_PACKAGES = ("fedprune", "fedprune_device", "fedprune_device.runtime", "fedprune_flash", "fedprune_flash.on_board")
_MODULES = (
    *(errors, extras, ed25519, home, state, wheel),
    *(board_files, install, installation, kit_folder, runtime_slot, service_control),
)
_MAIN = "import sys\nfrom fedprune_flash.on_board.install import main\nsys.exit(main())\n"


def installer_archive() -> bytes:
    """The installer, which `python3 install.pyz` runs; the same bytes whenever it is made."""
    files = {f"{name.replace('.', '/')}/__init__.py": b"" for name in _PACKAGES}  # the board's own import much more
    files |= {f"{m.__name__.replace('.', '/')}.py": Path(str(m.__file__)).read_bytes() for m in _MODULES}
    files["__main__.py"] = _MAIN.encode()
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        for name, content in files.items():
            archive.writestr(zipfile.ZipInfo(name), content)
    return data.getvalue()
