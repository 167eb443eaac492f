"""What the Python bindings of TensorRT offer: names and signatures, taken from the real wheels, without TensorRT.

    pip download --no-deps --dest wheels 'tensorrt-cu12-bindings==10.3.0'       (and so on; 8.6.1: tensorrt-bindings)
    python tests/support/fakes/make_tensorrt_census.py wheels > tests/support/fakes/tensorrt_census.json

The bindings are linked against NVIDIA's libraries, but only by a dozen of C functions: empty libraries with these let
them be imported, which is enough to ask them what they have. Needs gcc, binutils and the wheels' Python.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

WHOLE = [
    "Builder",
    "IBuilderConfig",
    "ICudaEngine",
    "IExecutionContext",
    "IHostMemory",
    "ILogger",
    "IOptimizationProfile",
    "IProgressMonitor",
    "ISerializationConfig",
    "ITensor",
    "ITimingCache",
    "OnnxParser",
    "OnnxParserRefitter",
    "ParserError",
    "Refitter",
    "Runtime",
    "BuilderFlag",
    "DataType",
    "MemoryPoolType",
    "NetworkDefinitionCreationFlag",
    "SerializationFlag",
    "TensorIOMode",
]
"""Classes whose members are all listed, with their signatures."""

PARTS = {"INetworkDefinition": ("num_inputs", "get_input", "num_outputs", "get_output", "name")}
"""Classes of which a few are listed."""

_LIST = """
import json, sys
sys.path.insert(0, sys.argv[1])
import tensorrt_bindings as trt
found = {"": {"__version__": "constant"}}
for name, kind in vars(trt.tensorrt).items():
    if not isinstance(kind, type):
        continue
    members = found[name] = {}
    for member in dir(kind):
        if member.startswith("_") and member != "__init__":
            continue
        what = next(vars(k)[member] for k in kind.__mro__ if member in vars(k))
        if isinstance(what, property):
            members[member] = ("rw " if what.fset else "ro ") + str(what.fget.__doc__)
        elif isinstance(getattr(kind, member), kind) or isinstance(what, type):
            members[member] = "constant"
        else:
            members[member] = str(getattr(kind, member).__doc__)
print(json.dumps(found))
"""


def census(wheel: Path) -> dict[str, dict[str, str]]:
    """Members by class of one wheel; what a member is comes as one line."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder / "wheel")
        libraries = folder / "libraries"
        libraries.mkdir()
        _empty_libraries(next((folder / "wheel").rglob("tensorrt*.so")), libraries)
        done = subprocess.run(
            [sys.executable, "-c", _LIST, str(folder / "wheel")],
            env={**os.environ, "LD_LIBRARY_PATH": str(libraries)},
            capture_output=True,
            text=True,
            check=True,
        )
    found: dict[str, dict[str, str]] = json.loads(done.stdout.splitlines()[-1])
    kept = {k: {m: _line(m, text) for m, text in found[k].items()} for k in ("", *WHOLE) if k in found}
    for kind, members in PARTS.items():
        kept[kind] = {m: _line(m, found[kind][m]) for m in members}
    return kept


def _empty_libraries(bindings: Path, folder: Path) -> None:
    """Libraries of the names that the bindings ask for; the first has all their functions, and each returns nothing."""
    dynamic = subprocess.run(["readelf", "-dW", bindings], capture_output=True, text=True, check=True).stdout
    symbols = subprocess.run(["nm", "-D", "--undefined-only", bindings], capture_output=True, text=True, check=True)
    rows = [line.split() for line in symbols.stdout.splitlines()]
    theirs = [r[-1] for r in rows if r[0] == "U" and "@" not in r[-1] and not r[-1].startswith(("Py", "_Py", "dl"))]
    for i, name in enumerate(re.findall(r"NEEDED.*\[(libnv[^]]*)\]", dynamic)):
        source = folder / f"{i}.c"
        source.write_text("".join(f"void *{s}(void) {{ return 0; }}\n" for s in theirs) if i == 0 else "int none;\n")
        command = ["gcc", "-shared", "-fPIC", f"-Wl,-soname,{name}", "-o", folder / name, source]
        subprocess.run(command, check=True)


def _line(member: str, text: str) -> str:
    """A signature as pybind11 gives it, each overload once, with types by their short names."""
    if text == "constant":
        return text
    text = re.sub(r"(tensorrt_bindings\.tensorrt|nvinfer1|typing|typing_extensions)(\.|::)", "", text)
    text = text.replace("SupportsInt", "int").replace("List[", "list[").replace("Buffer", "buffer")
    text = text.replace("nvonnxparser::IParserError", "ParserError")
    if text.startswith(("rw ", "ro ")):
        return text[:2] + " " + text.rpartition("-> ")[2].strip()
    found = re.findall(rf"^(?:\d+\. )?{re.escape(member)}(\(.*)$", text, re.MULTILINE)
    overloads = [f for f in found if not f.startswith("(*args, **kwargs)")] or found[:1]
    return " | ".join(overloads) or "inherited"


def main() -> None:
    """Write the census of all wheels in a folder: class, member, what it is, and the versions where it is that."""
    table: dict[str, dict[str, dict[str, list[str]]]] = {}
    wheels = sorted(Path(sys.argv[1]).glob("*.whl"), key=lambda w: [int(n) for n in _version(w).split(".")])
    for wheel in wheels:
        for kind, members in census(wheel).items():
            for member, line in members.items():
                table.setdefault(kind, {}).setdefault(member, {}).setdefault(line, []).append(_version(wheel))
    body: dict[str, Any] = {"versions": [_version(w) for w in wheels], "classes": table}
    text = json.dumps(body, indent=1, sort_keys=True)
    print(
        re.sub(r"\[\s+([^][{}]*?)\s+\]", lambda m: f"[{' '.join(m[1].split())}]", text)
    )  # lists of versions on one line


def _version(wheel: Path) -> str:
    return ".".join(wheel.name.split("-")[1].split(".post")[0].split(".")[:3])


if __name__ == "__main__":
    main()
