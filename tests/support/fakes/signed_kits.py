"""Kits whose manifests are changed and signed again."""

import json
from pathlib import Path
from typing import Any

from fedprune.security.keys import SigningKey
from fedprune_device.launcher.slot_store import SIGNATURE_PREFIX
from fedprune_flash.on_board.kit_folder import signed_text
from support.fakes.runtime_releases import KEY


def change(folder: Path, **changes: Any) -> None:
    """Change a kit's manifest and leave its signature."""
    (folder / "kit.json").write_text(json.dumps({**json.loads((folder / "kit.json").read_text()), **changes}))


def sign(folder: Path, key: SigningKey = KEY, **changes: Any) -> None:
    """Change a kit's manifest and sign it."""
    change(folder, **changes, key=key.verifying_key.hex)
    body = json.loads((folder / "kit.json").read_text())
    change(folder, signature=key.sign(SIGNATURE_PREFIX + signed_text(body).encode()).hex())
