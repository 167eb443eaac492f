"""Wheels of a few bytes, for kits that are made and installed in a moment."""

import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

PROGRAM = "import sys\n\ndef device():\n    print('fedprune', *sys.argv[1:])\n"


def wheel(
    folder: Path,
    name: str,
    version: str = "1.0",
    files: Mapping[str, str] | None = None,
    requires: Sequence[str] = (),
    extras: Sequence[str] = (),
    tag: str = "py3-none-any",
    scripts: str = "",
) -> Path:
    """Make a wheel whose package is named as it is, unless `files` says otherwise."""
    info = f"{name}-{version}.dist-info"
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
    lines += [f"Requires-Dist: {r}" for r in requires] + [f"Provides-Extra: {e}" for e in extras]
    content = {
        **(files or {f"{name}/__init__.py": ""}),
        f"{info}/METADATA": "\n".join(lines) + "\n",
        f"{info}/WHEEL": f"Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: {tag}\n",
    }
    if scripts:
        content[f"{info}/entry_points.txt"] = f"[console_scripts]\n{scripts}\n"
    content[f"{info}/RECORD"] = "".join(f"{path},,\n" for path in [*content, f"{info}/RECORD"])
    out = folder / f"{name}-{version}-{tag}.whl"
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(out, "w") as archive:
        for path, text in content.items():
            archive.writestr(path, text)
    return out


def fleet_of_wheels(folder: Path, *, jetson: bool = False, files: Mapping[str, str] | None = None) -> Path:
    """A folder with all that a tiny kit needs; returns fedprune's own wheel, which lies in it and gets `files`, too."""
    fleet_wheel = wheel(
        folder,
        "fedprune",
        "0.1.0",
        {"fedprune_device/__init__.py": "", "fedprune_start/__init__.py": PROGRAM, **(files or {})},
        ["numpy>=1", 'onnxruntime>=1; extra == "board"', 'pillow>=1; extra == "jetson"'],
        ["board", "jetson"],
        scripts="fedprune-device = fedprune_start:device",
    )
    wheel(folder, "numpy", "2.0")
    wheel(folder, "pillow", "10.0")
    if not jetson:
        wheel(folder, "onnxruntime", "1.31")
    return fleet_wheel
