"""A kit: a folder with everything that a board needs, for a USB stick, a card's boot partition or Ansible.

install.pyz       the installer, which needs nothing but Python
kit.json          the kind of board, sha256 and size of every file, and the server's signature of all that
device.env        the board's settings, as the service's environment
fedprune.service  the systemd unit
launcher.pyz      starts the runtime of a slot
ca.pem            other authorities of the broker, if any
claim.txt         a one-time claim, if any; the installer deletes it
wheelhouse/       fedprune and all its requirements for that board
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fedprune import __version__
from fedprune.core import disk, errors, text, validation
from fedprune.core.disk import file_digest, storage_errors
from fedprune.core.errors import ConfigError, KitError, UsageError, search_location
from fedprune.output import extras
from fedprune.security.keys import SigningKey, VerifyingKey
from fedprune.wire import topics
from fedprune_device.launcher import ed25519, slot_store, state
from fedprune_device.launcher.slot_store import SIGNATURE_PREFIX
from fedprune_device.releases import wheel
from fedprune_device.releases.program_archive import launcher_archive, program_archive
from fedprune_device.releases.wheel import Wheel, contents_digest
from fedprune_flash.kit import wheelhouse
from fedprune_flash.kit.board_settings import BoardSettings, check_authorities, check_claim
from fedprune_flash.kit.target import BoardTarget
from fedprune_flash.kit.unit import unit_text
from fedprune_flash.on_board import (
    board_files,
    board_system,
    install,
    installation,
    key_options,
    kit_folder,
    module_probe,
    removal,
    runtime_slot,
    service_control,
)
from fedprune_flash.on_board.board_system import SETTINGS_FOLDER, STATE_FOLDER
from fedprune_flash.on_board.kit_folder import (
    AUTHORITY_FILE,
    CLAIM_FILE,
    ENVIRONMENT_FILE,
    KIT_VERSION,
    LAUNCHER_FILE,
    MANIFEST_FILE,
    SERVICE_NAME,
    WHEELS_FOLDER,
    KitFolder,
    signed_text,
)
from fedprune_flash.on_board.runtime_slot import ENTRY_POINT, KIT_RELEASE_NUMBER

MAX_KIT_BYTES = 2**31  # a boot partition holds less


def server_signer(key: Path | None, *, unsigned: bool) -> SigningKey | None:
    """The server's signing key, which kits are checked against; None with `--unsigned`. Exactly one must be given."""
    if (key is None) is not unsigned:
        raise UsageError(
            "--signing-key or --unsigned",
            expected="one of them",
            hint="The key is identity/signing.key in the server's state folder.",
        )
    return None if key is None else SigningKey.load(key)


class Kit(KitFolder):
    """A kit, whose signature, if it has one, and files are checked; else `KitError`.

    `digest` is the manifest's sha256, `device` the board's name; `signed_by` is the key that signed it, as hex, empty
    if it is not signed.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        body = self.manifest
        self.signed_by = self.authenticate(None).hex() if self.signature or body.get("key") else ""
        self.check_files()
        self.digest = hashlib.sha256(self.read(MANIFEST_FILE)).hexdigest()
        try:
            self.target = BoardTarget(body.get("python", ""), body.get("architecture", ""), body.get("jetson") is True)
            self.device = topics.check_device(body.get("device"), error=ConfigError)
        except ConfigError as error:
            raise KitError(f"{folder / MANIFEST_FILE}: {error}") from error
        if self.bytes > MAX_KIT_BYTES:
            raise KitError(f"{folder}", expected=f"at most {MAX_KIT_BYTES} bytes", got=self.bytes)

    @property
    def paths(self) -> list[str]:
        """All files, the claim only while it exists."""
        return sorted({*self.file_names, MANIFEST_FILE, *([CLAIM_FILE] if self.has_claim else [])})

    @property
    def bytes(self) -> int:
        return sum((self.folder / path).stat().st_size for path in self.paths)


def build_kit(
    out: Path,
    board: BoardSettings,
    target: BoardTarget,
    *,
    wheel: Path | None = None,
    links: Sequence[Path] = (),
    authorities: bytes | None = None,
    claim: str | None = None,
    signer: SigningKey | None = None,
    tell: Callable[[str], None] = lambda text: None,
) -> Kit:
    """Make a kit; the folder appears once it is complete. A kit with a claim is readable only to this user.

    `wheel` is fedprune's own, built from the checkout by default; `links` are folders with wheels, instead of a
    network. `tell` is called with the name of each step. Raises `KitError` if the wheels are not available, or don't
    suit the target.
    """
    if out.exists():
        raise UsageError(f"{out} is there already", hint="Name a folder that isn't, or remove it.")
    if board.authority != (authorities is not None):
        raise ConfigError(
            "certificates of authorities", expected="given if and only if the board's settings have `authority`"
        )
    # Before the wheels, which take a minute to fetch.
    claim_text = None if claim is None else check_claim(claim, board.device)
    authority_bytes = None if authorities is None else check_authorities(authorities)
    if wheel is not None and not wheel.is_file():
        raise KitError(
            f"there is no wheel {wheel}", hint=f"`python -m build --wheel` makes one in dist/.{search_location(wheel)}"
        )
    with storage_errors(f"can't write {out}"):
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as folder:
            kit_folder_path = Path(folder) / "kit"
            wheels = kit_folder_path / WHEELS_FOLDER
            kit_folder_path.mkdir(mode=0o777 if claim_text is None else 0o700)
            wheels.mkdir()
            if wheel is None:
                tell("building fedprune's wheel")
            own_wheel = wheelhouse.build_wheel(Path(folder)) if wheel is None else wheel.resolve()
            tell("fetching wheels")
            wheelhouse.fetch_wheels(own_wheel, target, wheels, links)
            if not (wheels / own_wheel.name).exists():
                shutil.copyfile(own_wheel, wheels / own_wheel.name)
            tell("checking wheels")
            wheelhouse.check_wheelhouse(sorted(wheels.iterdir()), target)
            (kit_folder_path / INSTALLER_FILE).write_bytes(program_archive(_MODULES, install.__name__))
            (kit_folder_path / LAUNCHER_FILE).write_bytes(launcher_archive())
            variables = {"BROKER": board.server, "JOIN": board.join, "SITE": board.site, "DEVICE": board.device}
            environment = "".join(f"FEDPRUNE_{name}={value}\n" for name, value in variables.items() if value)
            settings = {ENVIRONMENT_FILE: environment, SERVICE_NAME: service_unit(board, target)}
            for name, text in settings.items():
                (kit_folder_path / name).write_text(text, encoding="utf-8")
            if authority_bytes is not None:
                (kit_folder_path / AUTHORITY_FILE).write_bytes(authority_bytes)
            if claim_text is not None:
                # The permissions first: the secret must not be readable to others for a moment.
                (kit_folder_path / CLAIM_FILE).touch(mode=0o600)
                (kit_folder_path / CLAIM_FILE).write_text(claim_text, encoding="ascii")
            contents = contents_digest(Wheel(path, path.name) for path in sorted(wheels.iterdir()))
            paths = [p for p in kit_folder_path.rglob("*") if p.is_file()]
            rows = [
                {"path": str(p.relative_to(kit_folder_path)), "bytes": p.stat().st_size, "sha256": file_digest(p)}
                for p in sorted(paths)
            ]
            (kit_folder_path / MANIFEST_FILE).write_text(
                _manifest_text(rows, target, board, contents, signer), encoding="utf-8"
            )
            kit_folder_path.rename(out)
    return open_kit(out)


def open_kit(folder: Path, signer: SigningKey | None = None) -> Kit:
    """Read and check a kit. The server of `signer` must have signed it; None takes any kit, signed or not."""
    kit = Kit(folder)
    if signer is not None and kit.signed_by != signer.verifying_key.hex:
        raise KitError(
            f"{folder} is not signed by this server",
            expected=f"key {signer.verifying_key.fingerprint}",
            got=f"key {VerifyingKey.from_hex(kit.signed_by).fingerprint}" if kit.signed_by else "no signature",
            hint="Make it with the --signing-key of this server, or take it with --unsigned.",
        )
    return kit


def _manifest_text(
    rows: Sequence[dict[str, Any]], target: BoardTarget, board: BoardSettings, contents: str, signer: SigningKey | None
) -> str:
    body: dict[str, Any] = {
        "version": KIT_VERSION,
        "fedprune": __version__,
        "python": target.python,
        "architecture": target.architecture,
        "jetson": target.jetson,
        "device": board.device,
        "data": board.data,
        "imports": dict(target.required_modules),
        "claim": next((row for row in rows if row["path"] == CLAIM_FILE), None),
        "files": [row for row in rows if row["path"] != CLAIM_FILE],
        "number": KIT_RELEASE_NUMBER,
        "entry": ENTRY_POINT,
        "contents": contents,
        "key": None if signer is None else signer.verifying_key.hex,
    }
    if signer is not None:
        body["signature"] = signer.sign(SIGNATURE_PREFIX + signed_text(body).encode()).hex()
    return json.dumps(body, indent=1, sort_keys=True) + "\n"


def service_unit(board: BoardSettings, target: BoardTarget) -> str:
    """The systemd unit: the strict one, or a Jetson's, whose agent may use the GPU."""
    command = ["run", "--patient", "--state", STATE_FOLDER, "--data", board.data]
    if board.authority:
        command += ["--ca", f"{SETTINGS_FOLDER}/{AUTHORITY_FILE}"]
    # Without samples the agent would be restarted again and again.
    condition = board.data if board.data.startswith("/") else ""
    return unit_text(command, jetson=target.jetson, condition=condition)


INSTALLER_FILE = "install.pyz"

# What `python3 install.pyz` runs.
_MODULES = (
    *(disk, errors, text, extras, validation, topics, ed25519, slot_store, state, wheel),
    *(board_files, board_system, install, installation, key_options, kit_folder, module_probe, removal),
    *(runtime_slot, service_control),
)
