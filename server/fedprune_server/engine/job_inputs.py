"""A job's inputs besides its settings, compared with those of the job's beginning or of its last start.

A job keeps the model with which it began, together with the user's own loss and metric: others are refused. Built-in
losses and metrics, samples of the server, a strategy's code and hardware profiles may change between two starts: the
new ones are used, and the start logs the change.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from fedprune.core.errors import ConfigError, MissingExtraError, ModelError
from fedprune.planning.profile_store import find_profile, profile_names
from fedprune.strategies.user_code_digest import user_code_digest
from fedprune_export import importing
from fedprune_server.config.job_settings import JobSettings
from fedprune_server.config.server_config import ServerConfig
from fedprune_server.executor.server_samples import LabelledSamples

log = logging.getLogger("fedprune.server")

_CONTENT_CHANGES = {
    "strategy": "has other code",
    "evaluation": "has other samples",
    "calibration": "has other samples",
    "profiles": "has other hardware profiles",
}


def import_choices(config: JobSettings) -> importing.ImportChoices:
    """How a job's settings say that its model is read."""
    choices = {choice.name: getattr(config, choice.name) for choice in fields(importing.ImportChoices)}
    return importing.ImportChoices(**choices | {"loss": config.loss or config.job.recipe.loss})


def read_job_model(config: JobSettings) -> bytes:
    """The configured model with its loss, metric and adapters. Errors advise what a server's operator can do, not
    options of `fedprune-export`. Raises `ModelError` if the model can't be used, and `MissingExtraError` if torch or
    timm is needed and not installed."""
    source = str(config.model)
    if importing.is_factory_source(source):
        log.info("reading the model %s: torch exports it, which may take minutes", source)
    try:
        return importing.read_source(source, import_choices(config))
    except ModelError as error:
        if "--input-shape" not in error.hint:
            raise
        hint = (
            "Give the module an attribute input_shape, such as (3, 32, 32), or the configuration "
            "[model] input_shape, such as [3, 32, 32]."
        )
        raise ModelError(error.what, expected=error.expected, got=error.got, hint=hint) from error


def check_job_model(config: JobSettings, raw: bytes, job_description: str) -> None:
    """Compare the configured model, loss and metric, as far as they are configured, with those of the job's beginning,
    which `raw` holds.

    A source that no longer exists is no difference: the job has a copy. Raises `ConfigError`, with the description of
    the job, if something differs, and `ModelError` if the model can't be used."""
    for choice in fields(importing.ImportChoices):
        is_compared = choice.name in ("loss", "metric", "base")
        if config.model is None and not is_compared and getattr(config, choice.name) != choice.default:
            raise ConfigError(
                ("model", choice.name), expected="path, too, or neither", got=f"{choice.name} alone",
                hint=f"A job that has begun keeps its {choice.name}: leave it out.",
            )  # fmt: skip
    current = _read_configured_model(config, raw)
    if current is None:
        return
    changes = importing.compare_models(raw, current)
    source, tensor_changes = config.model, changes.tensors
    is_factory = source is not None and importing.is_factory_source(source)
    kind, source_text = "", source
    if changes.graph:
        kind, source_text = "model", source or f"base = {config.base}"
    elif changes.loss:
        kind, source_text = "loss", config.loss or source
    elif changes.metric:
        kind, source_text = "metric", config.metric or source
    # A torch factory may draw other weights each time; its job continues with those that it drew first.
    elif tensor_changes and (
        source is None
        or not is_factory
        or importing.drawn_tensors(source, current, tensor_changes, partial(read_job_model, config)) < tensor_changes
    ):
        kind = "model"
    if kind:
        version = " Another version of torch may also export it differently." if is_factory or kind != "model" else ""
        raise ConfigError(
            f"{source_text} is not the {kind} with which {job_description}",
            hint=f"For another {kind} take another --state folder; to continue with this one leave the {kind} out."
            + version,
        )


def _read_configured_model(config: JobSettings, raw: bytes) -> bytes | None:
    """The model that the configuration gives now; None if it gives none, or its source no longer exists."""
    if config.model is None:
        if config.loss is config.metric is config.base is None:
            return None
        # Without a model's source the job's own model is compared, with the configured loss, metric and base.
        choices = importing.ImportChoices(loss=config.loss, metric=config.metric, base=config.base)
        return importing.with_choices(raw, choices)
    try:
        return read_job_model(config)
    except (MissingExtraError, ModelError) as error:
        if not isinstance(error, MissingExtraError) and not isinstance(
            error.__cause__, (FileNotFoundError, ModuleNotFoundError)
        ):
            raise
        log.warning("the job continues with the model that it began with, which could not be compared: %s", error)
        return None


def input_digests(
    config: ServerConfig, evaluation: LabelledSamples | None, calibration: npt.NDArray[Any] | None
) -> dict[str, str]:
    """Digests of the inputs that may change between two starts, by the setting that names them; empty for none.

    Raises `ConfigError` if the job's own strategy can't be used, `ProfileError` if a hardware profile can't.
    """
    folders = () if config.profiles is None else (config.profiles,)
    profiles = [find_profile(name, folders).to_dict() for name in sorted(profile_names(folders))] if folders else []
    return {
        "strategy": user_code_digest(config.job),
        "evaluation": _digest_arrays(evaluation or ()),
        "calibration": _digest_arrays(() if calibration is None else (calibration,)),
        "profiles": hashlib.sha256(json.dumps(profiles, sort_keys=True).encode()).hexdigest() if profiles else "",
    }


def input_changes(stored_settings: Mapping[str, Any], settings: Mapping[str, Any]) -> Iterator[str]:
    """Lines about inputs that differ between the start of the stored settings and this one."""
    inputs = [
        ("strategy", stored_settings["job"].get("strategy"), settings["job"]["strategy"]),
        ("profiles", stored_settings.get("server", {}).get("profiles"), settings["server"]["profiles"]),
        *((table, stored_settings.get(table), settings[table]) for table in ("evaluation", "calibration")),
    ]
    for key, previous, current in inputs:
        if previous != current:
            if key in settings:  # the others are settings of [job] and [server], which are compared as such
                yield f"{key}: {previous!r} is now {current!r}"
        elif "inputs" in stored_settings and stored_settings["inputs"].get(key, "") != settings["inputs"][key]:
            yield f"{key}: {current} {_CONTENT_CHANGES[key]}"


def _digest_arrays(arrays: Sequence[npt.NDArray[Any]]) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        # Without type and shape, arrays of the same bytes would have one digest.
        digest.update(json.dumps([array.dtype.str, array.shape]).encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest() if len(arrays) else ""
