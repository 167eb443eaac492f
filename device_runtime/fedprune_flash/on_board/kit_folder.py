"""The kit's folder as the installer in it sees it: its manifest, and files that are what the manifest says."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from fedprune.errors import KitError, shown
from fedprune_flash.on_board.board_files import blacken, sync

SAFE_PATH = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]*(/[A-Za-z0-9_][A-Za-z0-9_.+-]*){0,3}")
"""Paths that a kit may have."""

MANIFEST, CLAIM, WHEELS = "kit.json", "claim.txt", "wheelhouse"
SPENT = ".claim.txt.spent"
"""What a claim that was handed over is called while it is overwritten. No kit has a file of that name."""

LAUNCHER, ENVIRONMENT, AUTHORITY = "launcher.pyz", "device.env", "ca.pem"
SERVICE = "fedprune.service"

_VERSION = 2


class KitFolder:
    """A kit on the board.

    Args:
        folder: Where it is.

    Attributes:
        manifest: What kit.json says.
        wheels: The wheels, sorted by name.
        runtime: What the release in it is called: fedprune's version, and a digest of the wheels.

    Raises:
        KitError: There is no manifest, or it is not that of a kit.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest = _manifest(self.read(MANIFEST))
        rows = sorted((str(row["path"]), str(row["sha256"])) for row in self.manifest["files"])
        wheels = [row for row in rows if row[0].endswith(".whl")]
        self.names = {path for path, _ in rows}
        self.wheels = [folder / path for path, _ in wheels]
        digest = hashlib.sha256(json.dumps(wheels).encode()).hexdigest()
        self.runtime = f"{self.manifest['fedprune']}+kit.{digest[:12]}"

    @property
    def claimed(self) -> bool:
        """Whether a claim is in it, which is handed over once."""
        return self.manifest.get("claim") is not None and (self.folder / CLAIM).exists()

    @property
    def spent(self) -> bool:
        """Whether a claim that was handed over is still to be overwritten: a power cut came in between."""
        return (self.folder / SPENT).exists()

    def blacken_claim(self) -> None:
        """Overwrite and delete the claim, which was handed over. It loses its name first, durably: zeros in its place
        would be a damaged kit.

        Raises:
            OSError: The disk fails.
        """
        if self.claimed:
            (self.folder / CLAIM).replace(self.folder / SPENT)
            sync(self.folder)
        if self.spent:
            blacken(self.folder / SPENT)

    @property
    def jetson(self) -> bool:
        """Whether it leaves numpy, onnxruntime and TensorRT to the board."""
        return self.manifest.get("jetson") is True

    def check(self) -> None:
        """Make sure that every file is what the manifest says.

        Raises:
            KitError: One is not; the message names it.
        """
        rows = [*self.manifest["files"], *([self.manifest["claim"]] if self.claimed else [])]
        for row in rows:
            path = str(row["path"])
            if not SAFE_PATH.fullmatch(path):
                raise KitError(f"the kit names a file {shown(path)}, which is no path of a kit", hint="Make it again.")
            found = hashlib.sha256()
            try:
                with (self.folder / path).open("rb") as file:
                    while piece := file.read(2**20):
                        found.update(piece)
            except OSError as error:
                raise KitError(f"can't read {path} of the kit: {error.strerror}", hint="Copy the kit again.") from error
            if found.hexdigest() != row["sha256"]:
                raise KitError(f"{path} of the kit is damaged", hint="Copy the kit again.")

    def read(self, name: str) -> bytes:
        """A small file of it.

        Raises:
            KitError: It can't be read.
        """
        try:
            return (self.folder / name).read_bytes()
        except OSError as error:
            raise KitError(
                f"can't read {self.folder / name}: {error.strerror}", hint="This is no whole kit; copy it again."
            ) from error


def _manifest(raw: bytes) -> dict[str, Any]:
    try:
        body = json.loads(raw)
        if body["version"] != _VERSION or not isinstance(body["data"], str) or not body["fedprune"]:
            raise ValueError("another version")
        for row in [*body["files"], *filter(None, [body.get("claim")])]:
            if not isinstance(row["path"], str) or not isinstance(row["sha256"], str):
                raise ValueError("a row is none")
        if not all(isinstance(n, str) and isinstance(v, str) for n, v in body["imports"].items()):
            raise ValueError("imports")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise KitError("kit.json is not that of a kit for this installer", hint="Make the kit again.") from error
    made: dict[str, Any] = body
    return made
