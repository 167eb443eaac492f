"""Networks of timm by name: `timm:resnet18`."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedprune.core.errors import MissingExtraError, ModelError, reason, shown
from fedprune_export.importing.torch_export import quiet, torch_package
from fedprune_export.importing.torchvision_placeholder import torchvision_or_placeholder

PREFIX = "timm:"
"""What a source begins with that names a network of timm."""

_NAME = re.compile(r"[a-z0-9_]+(\.[a-z0-9_]+)?")


def timm_name(source: str) -> str:
    """The network that a source names, empty if none.

    A bare name counts where no file has it and timm, if it is installed, knows it.
    """
    if source.startswith(PREFIX):
        return source.removeprefix(PREFIX)
    if not _NAME.fullmatch(source) or Path(source).exists() or importlib.util.find_spec("timm") is None:
        return ""
    try:
        return source if _timm().is_model(source) else ""
    except (ModelError, MissingExtraError):
        return ""


def timm_model(name: str, input_shape: Sequence[int] | None = None) -> tuple[Any, tuple[int, ...]]:
    """A network of timm and the shape of its input.

    Its weights are the pretrained ones where an earlier use has left them on this machine, else random ones that are
    the same each time. Nothing is downloaded.

    Args:
        name: Its name, such as resnet18 or resnet18.a1_in1k.
        input_shape: Another shape than that of its training.

    Raises:
        ModelError: timm has no such network, or it can't be made for this shape.
        MissingExtraError: torch or timm is not installed.
    """
    torch, timm = torch_package(), _timm()
    if not _NAME.fullmatch(name) or not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models(), 3)
        raise ModelError(
            f"timm has no network {shown(name)}",
            hint=f"Similar names: {', '.join(close)}."
            if close
            else "Names: python -c 'import timm; print(*timm.list_models())'.",
        )
    settings = timm.get_pretrained_cfg(name)
    usual = tuple(settings.input_size) if settings is not None else (3, 224, 224)
    shape = tuple(input_shape or usual)
    chosen: dict[str, Any] = {}
    if shape[0] != usual[0]:
        chosen["in_chans"] = shape[0]
    weights = _cached(settings)
    if weights is not None:
        chosen.update(pretrained=True, pretrained_cfg_overlay={"file": weights})
    try:
        with quiet(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            sized = {"img_size": shape[1:]} if shape[1:] != usual[1:] else {}
            try:
                made = timm.create_model(name, **chosen, **sized)
            except TypeError:  # convolutional networks take any size and don't ask
                made = timm.create_model(name, **chosen)
    except Exception as error:
        raise ModelError(f"timm can't make {name} for input {shape} ({reason(error)})") from error
    return made.eval(), shape


def _cached(settings: Any) -> str | None:
    """Where pretrained weights lie on this machine."""
    source = getattr(settings, "hf_hub_id", None)
    if not source:
        return None
    try:
        hub: Any = importlib.import_module("huggingface_hub")
    except ImportError:
        return None
    found = hub.try_to_load_from_cache(source, "model.safetensors")
    return found if isinstance(found, str) and Path(found).is_file() else None


def _timm() -> Any:
    try:
        with quiet(), torchvision_or_placeholder():
            import timm
    except ImportError as error:
        raise MissingExtraError(
            f"a network of timm needs {error.name or 'timm'}, which is not installed", hint="pip install timm."
        ) from error
    except Exception as error:
        raise ModelError(
            f"importing timm failed ({type(error).__name__}: {reason(error)})",
            hint="`python -c 'import timm'` has to work; install timm again.",
        ) from error
    return timm
