"""Writing a board's bundle; `fedprune.bundle` says what is in one, and reads it back."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from fedprune import tensorfile
from fedprune.bundle import (
    ARCHITECTURE,
    INFERENCE,
    MANIFEST,
    SUBMODEL,
    TRAINING,
    WEIGHTS,
    Bundle,
    blocked_file,
    manifest,
    open_bundle,
)
from fedprune.disk import storage_errors, write_whole
from fedprune.errors import BundleError, ConfigError, shown
from fedprune.form_times import FormTimes
from fedprune.recipe import Recipe
from fedprune.selection import Selection
from fedprune_export.formulation import Forms
from fedprune_export.imported import Model
from fedprune_export.inference import inference_model
from fedprune_export.training import training_graph


def bundle_files(
    model: Model,
    selection: Selection,
    recipe: Recipe,
    *,
    training: bytes | None = None,
    opset: int | None = None,
    blocks: Sequence[int] = (),
) -> dict[str, bytes]:
    """The files of a bundle by name, without the manifest.

    Args:
        model: The whole model.
        selection: What of it the board holds.
        recipe: The local training that the training step is for.
        training: The training step, where it is known already: it is the same for every selection.
        opset: The opset of the inference graph; by default one that every supported onnxruntime loads.
        blocks: Lengths of blocks of channels for which a training step is written, too.

    Raises:
        ModelError: An operator can't be trained.
        BundleError: The selection doesn't fit the model.
        ConfigError: No processor has such blocks, or the recipe trains at several widths.
    """
    model.check(selection)
    if blocks and recipe.ordered_dropout:
        raise ConfigError(
            "a training step in blocks of channels",
            expected="a recipe that trains at one width",
            got="ordered dropout",
        )
    return {
        INFERENCE: inference_model(model, selection.widths, opset=opset),
        WEIGHTS: tensorfile.encode(selection.gather(model.tensors)),
        TRAINING: training_step(model, recipe) if training is None else training,
        ARCHITECTURE: model.architecture.to_json().encode(),
        SUBMODEL: selection.to_json().encode(),
        **{blocked_file(b): blocked_step(model, recipe, selection.widths, b) for b in blocks},
    }


def training_step(model: Model, recipe: Recipe) -> bytes:
    """The training step of a model, for any of its widths.

    Raises:
        ModelError: An operator can't be trained.
    """
    return training_graph(model, recipe.features).to_bytes()


def blocked_step(
    model: Model, recipe: Recipe, widths: Sequence[int], block: int, times: FormTimes | None = None
) -> bytes:
    """The training step of a model at these widths and for whole batches alone.

    Args:
        model: The model.
        recipe: How it is trained.
        widths: Channels of every group.
        block: Channels that the processor computes at once.
        times: What forms of layers take there; None if that isn't known.

    Raises:
        ModelError: An operator can't be trained.
        ConfigError: No processor has such blocks.
    """
    forms = Forms(block, recipe.micro_batch, times=times)
    return training_graph(model, recipe.features, widths=widths, forms=forms).to_bytes()


def write_bundle(
    folder: Path,
    files: Mapping[str, bytes],
    selection: Selection,
    recipe: Recipe,
    target: str,
    class_names: tuple[str, ...] = (),
) -> Bundle:
    """Write a bundle and read it back.

    The old manifest goes first and the new one comes last, so that a folder that is only half written is no bundle.

    Args:
        folder: Where to; it is made, or must be empty or hold a bundle of the same target, which is replaced.
        files: From `bundle_files`; further files (reports) are listed in the manifest, too.
        selection: What the board holds.
        recipe: Its local training.
        target: Name of the hardware profile.
        class_names: Names of the output's entries.

    Raises:
        BundleError: The folder holds something else, or the files don't belong together.
        StorageFullError: There is no room; the folder is no bundle then.
        StorageError: The folder can't be made or written to.
    """
    classes = selection.architecture.classes
    if class_names and len(class_names) != classes:
        raise BundleError("class names", expected=f"{classes} names", got=len(class_names))
    check_folder(folder, target)
    with storage_errors(f"can't write a bundle to {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / MANIFEST).unlink(missing_ok=True)
    for name, raw in files.items():
        write_whole(folder / name, raw)
    write_whole(folder / MANIFEST, manifest(files, selection, recipe, target, class_names).encode())
    return open_bundle(folder)


def is_bundle(folder: Path) -> bool:
    """Whether a folder claims to be a bundle."""
    return (folder / MANIFEST).exists()


def check_folder(folder: Path, target: str) -> None:
    """Refuse to write a bundle among other things, or in the place of another board's.

    Args:
        folder: Where it is to be written.
        target: Name of its hardware profile.

    Raises:
        BundleError: The folder is a file, or holds something else than a bundle of this target.
    """
    if folder.exists() and not folder.is_dir():
        raise BundleError(f"{folder} is not a folder", hint="Give another --out.")
    if folder.is_dir() and not is_bundle(folder) and any(folder.iterdir()):
        raise BundleError(f"{folder} is not empty and holds no bundle", hint="Empty it, or give another --out.")
    there = _target(folder / MANIFEST)
    if there not in ("", target):
        raise BundleError(
            f"{folder} holds the bundle of another board",
            expected=f"one of {target}",
            got=f"one of {shown(there)}",
            hint="Give each board its own --out; or name all in one --target, which makes a folder each. To replace "
            "it, delete the folder.",
        )


def _target(path: Path) -> str:
    """Whose bundle a manifest vouches for; empty where there is none that can be read."""
    try:
        found = json.loads(path.read_bytes())["target"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return ""
    return found if isinstance(found, str) else ""
