"""Archives of modules that Python runs as one file: the launcher next to the slots, and the installer of a kit."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

from fedprune_device.launcher import ed25519, launcher, sd_notify, slot_store
from fedprune_device.launcher import state as launcher_state


def program_archive(modules: Iterable[ModuleType], main: str) -> bytes:
    """One file that Python runs: these modules, and a call of `main` in the one of that name; the same bytes every
    time."""
    names = {module.__name__: Path(str(module.__file__)) for module in modules}
    packages = {name.rsplit(".", n)[0] for name in names for n in range(1, name.count(".") + 1)}
    files = {f"{p.replace('.', '/')}/__init__.py": b"" for p in sorted(packages)}  # the packages' own import much more
    files |= {f"{name.replace('.', '/')}.py": path.read_bytes() for name, path in names.items()}
    files["__main__.py"] = f"import sys\nfrom {main} import main\nsys.exit(main())\n".encode()
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        for name, content in files.items():
            archive.writestr(zipfile.ZipInfo(name), content)
    return data.getvalue()


def launcher_archive() -> bytes:
    return program_archive((ed25519, launcher_state, slot_store, sd_notify, launcher), launcher.__name__)
