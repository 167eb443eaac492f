"""Bundles: the folder with everything that one board needs, and the manifest with the digest of every file in it.

inference.onnx        the submodel; its weights are external data inside weights.safetensors weights.safetensors   the
weights; new ones of the same shapes can take their place training.onnx         one training step, for any widths of the
architecture architecture.json     the whole model's tensors and channel groups submodel.json         the channels that
this board holds base.safetensors      frozen weights in low precision, which never change; optional engine.json
how a TensorRT engine is to be built (`runtime.tensorrt_config`); optional manifest.json         size and sha256 of each
of these

A bundle may also have the files of lower precisions (`fedprune.runtime.precision_files.files_of`), which the manifest
lists, too.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fedprune.core import tensorfile
from fedprune.core.disk import file_digest, read_file
from fedprune.core.errors import BundleError, ConfigError, path_remedy, shape_text, value_text
from fedprune.model.architecture import Architecture
from fedprune.model.recipe import Recipe
from fedprune.model.selection import Selection
from fedprune.runtime import tensorrt_config
from fedprune.runtime.precision_files import FLOAT32, PRECISIONS, files_of, graph_file, served_files
from fedprune.runtime.tensorrt_config import EnginePlan

FORMAT = "fedprune.bundle/1"
MANIFEST = "manifest.json"
INFERENCE, WEIGHTS = served_files(FLOAT32)
BASE = "base.safetensors"
TRAINING = "training.onnx"
ARCHITECTURE = "architecture.json"
SUBMODEL = "submodel.json"
# Subfolder with a complete new bundle whose files are still being moved into place, see `files_folder`.
COMPLETE_FOLDER = ".bundle.complete"
_COPY_HINT = "Copy or export the bundle again."
# Characters of a manifest's value in a message: a list of widths may have thousands.
_MAX_SHOWN_VALUE = 200

FILES = (INFERENCE, WEIGHTS, TRAINING, ARCHITECTURE, SUBMODEL)


@dataclass(frozen=True)
class Bundle:
    """A bundle whose files have been checked.

    Attributes:
        architecture: The whole model.
        selection: What of it this board holds.
        recipe: The local training that `training.onnx` was made for.
        target: Name of the hardware profile.
        class_names: Names of the output's entries, or empty.
        engine: How a TensorRT engine is to be built; None where the bundle doesn't say.
        precisions: Lower precisions at which it can predict as well.
    """

    folder: Path
    architecture: Architecture
    selection: Selection
    recipe: Recipe
    target: str
    class_names: tuple[str, ...]
    engine: EnginePlan | None = None
    precisions: tuple[str, ...] = ()

    def path(self, name: str) -> Path:
        return self.folder / name

    @property
    def base(self) -> Path | None:
        """The file of its frozen weights in low precision; None where it has none."""
        return self.path(BASE) if self.architecture.base else None

    def frozen_weights(self) -> dict[str, npt.NDArray[Any]]:
        """The arrays of the file `base` by name, mapped, as the training graph takes them; empty without such a
        file."""
        return {} if self.base is None else tensorfile.map_tensors(self.base)


def manifest_text(
    files: Mapping[str, bytes], selection: Selection, recipe: Recipe, target: str, class_names: tuple[str, ...] = ()
) -> str:
    """The manifest of these files, as JSON text."""
    body = {
        "format": FORMAT,
        "target": target,
        "architecture": selection.architecture.digest,
        "selection": selection.digest,
        "widths": list(selection.widths),
        "classes": selection.architecture.classes,
        "class_names": list(class_names),
        "recipe": recipe.to_dict(),
        "files": {n: {"size": len(raw), "sha256": tensorfile.sha256_hex(raw)} for n, raw in sorted(files.items())},
    }
    return json.dumps(body, indent=2) + "\n"


def files_folder(folder: Path) -> Path:
    """The folder that holds a bundle's files: its own, or `COMPLETE_FOLDER` within it after an export was cut off. An
    export writes a whole bundle before it touches the one that is there. From the moment when the new one is complete
    until its last file is in its place, the folder itself may hold files of both."""
    complete = folder / COMPLETE_FOLDER
    try:
        return complete if (complete / MANIFEST).exists() else folder
    except OSError:  # the reader of the manifest reports why
        return folder


def open_bundle(folder: str | os.PathLike[str]) -> Bundle:
    """Check every file of a bundle against its manifest and read what describes it. Raises `BundleError`, which names
    the file, if the manifest is missing or damaged, a file is missing, cut short or changed, or manifest, widths and
    tensors contradict each other."""
    try:
        folder = files_folder(Path(folder))
    except TypeError as error:
        raise BundleError("bundle", expected="the path of its folder", got=type(folder).__name__) from error
    body = _read_manifest(folder / MANIFEST)
    precisions = tuple(p for p in PRECISIONS if graph_file(p) in body["files"])
    for name in (*FILES, *(n for p in precisions for n in files_of(p))):
        _check_file(folder / name, body["files"].get(name))
    architecture = Architecture.from_json(read_file(folder / ARCHITECTURE))
    selection = Selection.from_json(read_file(folder / SUBMODEL), architecture)
    if selection.digest != body["selection"]:
        raise BundleError(f"{folder}: the manifest names another selection", expected=body["selection"])
    _check_agreement(folder / MANIFEST, body, selection)
    _check_tensors(folder / WEIGHTS, {name: ("F32", shape) for name, shape in selection.shapes().items()})
    if architecture.base:
        _check_file(folder / BASE, body["files"].get(BASE))
        _check_tensors(folder / BASE, {b.name: (b.code, b.shape) for b in architecture.base})
    try:
        recipe = Recipe.from_dict(body["recipe"])
    except (ConfigError, TypeError) as error:
        raise BundleError(f"{folder / MANIFEST}: {error}") from error
    return Bundle(
        folder,
        architecture,
        selection,
        recipe,
        str(body["target"]),
        tuple(map(str, body["class_names"])),
        _load_engine_plan(folder, body["files"]),
        precisions,
    )


def _load_engine_plan(folder: Path, files: Mapping[str, Any]) -> EnginePlan | None:
    """The plan of an engine, if the manifest lists one; the graph that it names is checked, too."""
    path = folder / tensorrt_config.ENGINE_PLAN_FILE
    if path.name not in files:
        return None
    _check_file(path, files[path.name])
    try:
        plan = EnginePlan.from_json(read_file(path), str(path))
    except ConfigError as error:
        raise BundleError(str(error), hint="Export the bundle again.") from error
    _check_file(folder / plan.graph, files.get(plan.graph))
    return plan


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        body = json.loads(read_file(path))
    except OSError as error:
        raise BundleError(
            f"can't read {path}: {error.strerror}", hint=path_remedy(error, "Is this a bundle's folder?")
        ) from error
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{path} is damaged", hint="Export the bundle again.") from error
    if not isinstance(body, dict) or body.get("format") != FORMAT:
        raise BundleError(f"{path} is not the manifest of a bundle", expected=FORMAT)
    required_types = {"files": dict, "recipe": dict, "class_names": list, "target": str, "selection": str}
    for key, kind in required_types.items():
        if not isinstance(body.get(key), kind):
            raise BundleError(f"{path}: {key}", expected=f"a {kind.__name__}", got=type(body.get(key)).__name__)
    return body


def _check_agreement(path: Path, body: Mapping[str, Any], selection: Selection) -> None:
    """Check that the manifest agrees with the files, because some readers read only the manifest."""
    architecture = selection.architecture
    facts = {"architecture": architecture.digest, "widths": list(selection.widths), "classes": architecture.classes}
    for key, fact in facts.items():
        if body.get(key) != fact:
            raise BundleError(
                f"{path}: {key} differs from that of the files",
                expected=fact,
                got=str(body.get(key))[:_MAX_SHOWN_VALUE],
                hint="Export the bundle again.",
            )


def _check_tensors(path: Path, expected_tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> None:
    """Check that tensors have the types and shapes that the architecture and the widths give them."""
    try:
        # Mapped, because on boards a copy of all weights is memory that they may not have.
        raw: memoryview = np.memmap(path, np.uint8, "r").data
        stored_tensors = {name: (code, shape) for name, (code, shape, _, _) in tensorfile.tensor_offsets(raw).items()}
    except (BundleError, ValueError) as error:  # numpy maps no empty file
        raise BundleError(f"{path}: {error}") from error
    except OSError as error:
        raise BundleError(f"can't read {path}: {error.strerror}", hint=path_remedy(error, _COPY_HINT)) from error
    # In the order of the model, so that the message names the first wrong tensor; then those that are too many.
    for name in (*expected_tensors, *stored_tensors):
        if stored_tensors.get(name) != expected_tensors.get(name):
            raise BundleError(
                f"{path}: tensor {value_text(name)} doesn't have the widths given by {SUBMODEL} and the manifest",
                expected=_tensor_text(expected_tensors.get(name)),
                got=_tensor_text(stored_tensors.get(name)),
                hint="Export the bundle again.",
            )


def _tensor_text(tensor: tuple[str, tuple[int, ...]] | None) -> str:
    return "no such tensor" if tensor is None else f"{tensor[0]} {shape_text(*tensor[1])}"


def _check_file(path: Path, entry: object) -> None:
    if (
        not isinstance(entry, dict)
        or not isinstance(entry.get("size"), int)
        or not isinstance(entry.get("sha256"), str)
    ):
        raise BundleError(f"the manifest doesn't list {path.name}", hint="Export the bundle again.")
    try:
        size = path.stat().st_size
        if size != entry["size"]:
            raise BundleError(
                f"{path} is cut short or too long",
                expected=f"{entry['size']} bytes",
                got=f"{size} bytes",
                hint=_COPY_HINT,
            )
        digest = file_digest(path)
    except OSError as error:
        raise BundleError(f"can't read {path}: {error.strerror}", hint=path_remedy(error, _COPY_HINT)) from error
    if digest != entry["sha256"]:
        raise BundleError(
            f"{path} has changed since it was exported",
            expected=f"sha256 {entry['sha256'][:16]}",
            got=digest[:16],
            hint=_COPY_HINT,
        )
