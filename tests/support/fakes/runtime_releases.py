"""Small releases of a runtime, whose files all say which version they are of."""

import platform
import sys
import zipfile
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedprune.releases.release import Release, write_release
from fedprune.security.certificates import PIN_BYTES
from fedprune.security.join_claim import JoinClaim
from fedprune.security.keys import SigningKey, VerifyingKey
from fedprune_device.launcher.slot_store import KEY_FILE, write_file
from fedprune_device.launcher.state import SLOTS, LauncherState
from fedprune_device.releases.installer import LAUNCHER_FILE, ReleaseInstaller, ReleaseSource
from fedprune_device.releases.program_archive import launcher_archive
from fedprune_device.releases.release_trial import REQUIRED_MODULES
from fedprune_device.releases.wheel import Wheel, contents_digest

KEY = SigningKey(Ed25519PrivateKey.from_private_bytes(bytes(range(32))))
PUBLIC = KEY.verifying_key
CLAIM = JoinClaim(bytes(5), bytes(15), bytes(PIN_BYTES)).text
PYTHON = f"cp{sys.version_info.major}{sys.version_info.minor}"
APP = "import sys\n\ndef main() -> int:\n    print('version', VERSION)\n    return 0\n"


OUTSIDE = REQUIRED_MODULES  # what a release without wheels of it takes from the Python that runs the tests


def make_wheel(path: Path, files: dict[str, bytes | str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def make_release(
    folder: Path,
    number: int,
    *,
    app: str = APP,
    entry: str = "app:main",
    extra_files: dict[str, bytes | str] | None = None,
    shared: Path | None = None,
    key: SigningKey = KEY,
    **changes: object,
) -> Path:
    """A release of two wheels; its first lines say `VERSION = number`. `shared` is a further wheel."""
    version_line = f"VERSION = {number}\n"
    wheels = [
        make_wheel(
            folder / "wheels" / f"app-{number}-py3-none-any.whl",
            {
                "app/__init__.py": version_line + app,
                "app/part.py": version_line,
                f"app-{number}.dist-info/METADATA": version_line,
            },
        ),
        make_wheel(
            folder / "wheels" / f"library-{number}-py3-none-any.whl",
            {
                f"library-{number}.data/purelib/library/__init__.py": version_line,
                "library/deep/er/data.txt": version_line * 50,
                **(extra_files or {}),
            },
        ),
        *([] if shared is None else [shared]),
    ]
    values: dict[str, object] = {"python": PYTHON, "machine": platform.machine(), "unpacked": 10**6}
    values |= {"version": f"0.{number}.0", "entry": entry, "created": "2026-01-01T00:00:00Z", **changes}
    values["contents"] = contents_digest(Wheel(path, path.name) for path in wheels)
    write_release(folder, lambda files: Release(number=number, files=files, **values), wheels, key)  # type: ignore[arg-type]
    return folder


def versions_in(slot: Path) -> set[str]:
    """Which versions the files of a slot are of."""
    return {p.read_text().splitlines()[0] for p in slot.rglob("*") if p.is_file()}


def source(folder: Path) -> ReleaseSource:
    return ReleaseSource.of_folder(folder)


def set_up(root: Path, folder: Path, key: VerifyingKey = PUBLIC) -> ReleaseInstaller:
    """A board that runs a release and has the launcher, as a kit leaves it."""
    installer = ReleaseInstaller(root, key)
    home = installer.home
    for name in ("state", "incoming", *SLOTS):
        (root / name).mkdir(parents=True)
    write_file(root / KEY_FILE, key.hex.encode())
    write_file(root / LAUNCHER_FILE, launcher_archive())
    home.save(LauncherState(SLOTS[1]))
    home.save(LauncherState(SLOTS[0], highest=installer.stage(source(folder)).number))
    return installer
