"""The kit's folder on the board: its manifest, and files that match it."""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

from fedprune.core.disk import open_file
from fedprune.core.errors import KitError, path_remedy, value_text
from fedprune_device.launcher.ed25519 import verify_signature
from fedprune_device.launcher.slot_store import SIGNATURE_PREFIX, digest_and_size, sync_slot_folder
from fedprune_flash.on_board.board_files import overwrite_and_delete

# Paths that a kit may have: neither absolute nor upwards, and no hidden files.
SAFE_PATH = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]*(/[A-Za-z0-9_][A-Za-z0-9_.+-]*){0,3}")

MANIFEST_FILE, CLAIM_FILE, WHEELS_FOLDER = "kit.json", "claim.txt", "wheelhouse"
# The name of a claim that was handed over, while it is overwritten. No kit has a file of that name.
SPENT_CLAIM = ".claim.txt.spent"

LAUNCHER_FILE, ENVIRONMENT_FILE, AUTHORITY_FILE = "launcher.pyz", "device.env", "ca.pem"
SERVICE_NAME = "fedprune.service"

KIT_VERSION = 4

_MAX_FILES = 500  # a wheelhouse has some tens of files
_MAX_READ_BYTES = 2**22  # bytes of a file that is read as a whole: any but wheels


class KitFolder:
    """A kit on the board; raises `KitError` if its manifest is missing or invalid.

    `runtime` is the name of its release: fedprune's version, and a digest of the wheels. `signed_text` is the text that
    is signed, `signature` as hex, empty without one.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest = _manifest(self.read(MANIFEST_FILE))
        self.signature = str(self.manifest.pop("signature", ""))
        self.signed_text = signed_text(self.manifest)
        rows = sorted((str(row["path"]), str(row["sha256"])) for row in self.manifest["files"])
        wheels = [row for row in rows if row[0].endswith(".whl")]
        self.file_names = {path for path, _ in rows}
        self.wheels = [folder / path for path, _ in wheels]
        wheels_digest = hashlib.sha256(json.dumps(wheels).encode()).hexdigest()
        self.runtime = f"{self.manifest['fedprune']}+kit.{wheels_digest[:12]}"

    @property
    def has_claim(self) -> bool:
        return self.manifest.get("claim") is not None and (self.folder / CLAIM_FILE).exists()

    @property
    def has_spent_claim(self) -> bool:
        """Whether a power cut came before a claim that was handed over was overwritten."""
        return (self.folder / SPENT_CLAIM).exists()

    def overwrite_claim(self) -> None:
        """Overwrite and delete the claim, which was handed over.

        It is renamed durably first, because zeros in its place would be a damaged kit.
        """
        if self.has_claim:
            (self.folder / CLAIM_FILE).replace(self.folder / SPENT_CLAIM)
            sync_slot_folder(self.folder)
        if self.has_spent_claim:
            overwrite_and_delete(self.folder / SPENT_CLAIM)

    @property
    def jetson(self) -> bool:
        return self.manifest.get("jetson") is True

    @property
    def signer_key(self) -> bytes:
        """The key that the manifest names as its signer's; raises `ValueError` if it names none."""
        return bytes.fromhex(str(self.manifest.get("key", "")))

    def authenticate(self, known_key: bytes | None) -> bytes:
        """Check the manifest's signature before anything else is read; returns the key that made it. Raises `KitError`.

        `known_key` is the server's key, as this board knows it; None trusts the kit's own.
        """
        try:
            key, signature = self.signer_key, bytes.fromhex(self.signature)
        except ValueError:
            key = signature = b""
        if known_key is not None and key != known_key:
            raise KitError(
                "the kit is not signed by the server that this board knows",
                expected=f"key {key_fingerprint(known_key or b'')}",
                got=f"key {key_fingerprint(key)}" if key else "no signature",
                hint="Take a kit that this server signed. If its key has changed, name the new one with --key.",
            )
        if not verify_signature(key, signature, SIGNATURE_PREFIX + self.signed_text.encode()):
            raise KitError("the kit's manifest is not what was signed", hint="Copy or make the kit again.")
        return key

    def check_files(self) -> None:
        """Make sure that every file matches the manifest, and that there is no other; raises `KitError`.

        Names that begin with a dot are ignored: operating systems leave them on sticks, and no kit has any.
        """
        expected_names = self.file_names | {MANIFEST_FILE}
        if self.manifest.get("claim") is not None:
            expected_names |= {CLAIM_FILE}
        for path in sorted(self.folder.rglob("*")):
            name = str(path.relative_to(self.folder))
            if any(step.startswith(".") for step in name.split("/")):
                continue
            if path.is_symlink() or not (path.is_dir() or path.is_file()):
                raise KitError(f"{value_text(name)} of the kit isn't a plain file", hint="Copy or make the kit again.")
            if not path.is_dir() and name not in expected_names:
                raise KitError(f"{value_text(name)} is not part of the kit", hint="Remove it, or make the kit again.")
        rows = [*self.manifest["files"], *([self.manifest["claim"]] if self.has_claim else [])]
        for row in rows:
            name = str(row["path"])
            if not SAFE_PATH.fullmatch(name):
                raise KitError(
                    f"the kit names a file {value_text(name)}, which isn't a path of a kit", hint="Make it again."
                )
            if not (self.folder / name).exists():
                raise KitError(f"{name} of the kit is missing", hint="Copy the kit again.")
            if digest_and_size(self.folder / name) != (row["sha256"], row.get("bytes")):
                raise KitError(f"{name} of the kit is damaged", hint="Copy the kit again.")

    def read(self, name: str) -> bytes:
        try:
            with open_file(self.folder / name) as file:
                size = os.fstat(file.fileno()).st_size
                if size <= _MAX_READ_BYTES:
                    return file.read()
        except OSError as error:
            raise KitError(
                f"can't read {self.folder / name}: {error.strerror}",
                hint=path_remedy(error) or "Name a folder that `fedprune-flash kit` made, or copy the kit again.",
            ) from error
        raise KitError(f"{self.folder / name}", expected=f"at most {_MAX_READ_BYTES} bytes", got=size)


def signed_text(body: dict[str, Any]) -> str:
    """The part of a kit's manifest that is signed: all of it but the signature."""
    return json.dumps({name: body[name] for name in body if name != "signature"}, indent=1, sort_keys=True) + "\n"


def key_fingerprint(key: bytes) -> str:
    """A key's fingerprint, as `fedprune-server init` shows it."""
    digits = hashlib.sha256(key).hexdigest()[:20]
    return "-".join(digits[i : i + 4] for i in range(0, 20, 4))


def _manifest(raw: bytes) -> dict[str, Any]:
    try:
        body = json.loads(raw)
        if body["version"] != KIT_VERSION or not isinstance(body["data"], str) or not body["fedprune"]:
            raise ValueError("another version")
        if not isinstance(body["device"], str):
            raise ValueError("no board")
        if not 0 < len(body["files"]) <= _MAX_FILES:
            raise ValueError("number of files")
        for row in [*body["files"], *filter(None, [body.get("claim")])]:
            if not isinstance(row["path"], str) or not isinstance(row["sha256"], str):
                raise ValueError("a row is none")
        if not all(isinstance(n, str) and isinstance(v, str) for n, v in body["imports"].items()):
            raise ValueError("imports")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise KitError("kit.json is not that of a kit for this installer", hint="Make the kit again.") from error
    manifest: dict[str, Any] = body
    return manifest
