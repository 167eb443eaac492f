"""Makes networks of timm by name: `timm:resnet18`.

timm imports torchvision for image transforms and operators that its networks don't need, so a placeholder replaces it
where it is not installed.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

from fedprune.core.errors import MissingExtraError, ModelError, did_you_mean, error_reason, value_text
from fedprune_export.importing.quiet_libraries import silence_libraries
from fedprune_export.importing.torch_loading import torch_package

TORCHVISION = "torchvision"

# timm brings torchvision from the usual index, which can't be imported next to a torch of the other one.
INSTALL_TIMM = "pip install timm (before it torchvision, from the index that torch is from)"


@contextmanager
def torchvision_or_placeholder() -> Iterator[None]:
    """Replace torchvision by a placeholder while timm is imported, if it is missing or can't be imported.

    The placeholder's modules are removed from `sys.modules` afterwards, so that other packages see no torchvision.
    """
    try:
        importlib.import_module(TORCHVISION)
    except Exception:  # noqa: BLE001 - whatever it fails with, timm can do without it
        _remove_torchvision()
    else:
        yield
        return
    finder = _Finder()
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        _remove_torchvision()


def _remove_torchvision() -> None:
    for name in [n for n in sys.modules if n.partition(".")[0] == TORCHVISION]:
        del sys.modules[name]


class _PlaceholderType(type):
    """A class that can be named, compared and derived from, but not instantiated; its members are their names."""

    def __getattr__(cls, name: str) -> str:
        if name.startswith("__"):
            raise AttributeError(name)
        return name

    def __call__(cls, *_: object, **__: object) -> NoReturn:
        raise MissingExtraError(
            f"timm needs torchvision's {cls.__name__} here, and torchvision is missing or can't be imported",
            hint="Install the torchvision that belongs to your torch; `python -c 'import torchvision'` has to work.",
        )


class _PlaceholderModule(ModuleType):
    def __getattr__(self, name: str) -> _PlaceholderType:
        if name.startswith("__"):
            raise AttributeError(name)
        return _PlaceholderType(name, (), {})


class _Finder(MetaPathFinder, Loader):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname.partition(".")[0] != TORCHVISION:
            return None
        return ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _PlaceholderModule(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


TIMM_PREFIX = "timm:"  # the beginning of a source that names a network of timm

_NAME = re.compile(r"[a-z0-9_]+(\.[a-z0-9_]+)?")


def timm_name(source: str) -> str:
    """The network of timm that a source names; empty if it names none.

    A name without the prefix counts if no such file exists, and timm is installed and has the network.
    """
    if source.startswith(TIMM_PREFIX):
        return source.removeprefix(TIMM_PREFIX)
    if not _NAME.fullmatch(source) or Path(source).exists() or importlib.util.find_spec("timm") is None:
        return ""
    try:
        return source if _import_timm().is_model(source) else ""
    except (ModelError, MissingExtraError):
        return ""


def timm_model(name: str, input_shape: Sequence[int] | None = None) -> tuple[Any, tuple[int, ...]]:
    """A network of timm and the shape of its input.

    Its weights are the pretrained ones if an earlier use has left them on this machine, otherwise random ones that are
    the same each time. Nothing is downloaded. Raises `ModelError` if timm has no network of this name, such as resnet18
    or resnet18.a1_in1k, or it can't be made for this shape; `MissingExtraError` if torch or timm is not installed.
    """
    try:
        torch, timm = torch_package(), _import_timm()
    except MissingExtraError as error:
        # Both may be missing; one message then names both.
        if "timm" in error.what or importlib.util.find_spec("timm") is not None:
            raise
        raise error.with_subject(f"{error.what}, and neither is timm: {INSTALL_TIMM}") from error
    if not _NAME.fullmatch(name) or not timm.is_model(name):
        raise ModelError(
            f"timm has no network {value_text(name)}{did_you_mean(name, timm.list_models())}",
            hint="Names: python -c 'import timm; print(*timm.list_models())'.",
        )
    settings = timm.get_pretrained_cfg(name)
    usual = tuple(settings.input_size) if settings is not None else (3, 224, 224)
    shape = tuple(input_shape or usual)
    options: dict[str, Any] = {"in_chans": shape[0]} if shape[0] != usual[0] else {}
    weights = _cached_weights(settings)
    if weights is not None:
        # A file instead of a name keeps timm from asking the hub for a newer version.
        options.update(pretrained=True, pretrained_cfg_overlay={"file": weights})
    try:
        with silence_libraries(), torch.random.fork_rng(devices=[]):
            # Untrained weights must be the same at every call: a restarted job compares its model with the stored one.
            torch.manual_seed(0)
            sized = {"img_size": shape[1:]} if shape[1:] != usual[1:] else {}
            try:
                network = timm.create_model(name, **options, **sized)
            except TypeError:  # convolutional networks take any size and don't ask
                network = timm.create_model(name, **options)
    except Exception as error:
        raise ModelError(f"timm can't make {name} for input {shape} ({error_reason(error)})") from error
    return network.eval(), shape


def _cached_weights(settings: Any) -> str | None:
    """The cached file of pretrained weights; None without one."""
    source = getattr(settings, "hf_hub_id", None)
    if not source:
        return None
    try:
        hub: Any = importlib.import_module("huggingface_hub")
    except ImportError:
        return None
    path = hub.try_to_load_from_cache(source, "model.safetensors")
    return path if isinstance(path, str) and Path(path).is_file() else None


def _import_timm() -> Any:
    try:
        with silence_libraries(), torchvision_or_placeholder():
            import timm
    except ImportError as error:
        raise MissingExtraError(
            f"a network of timm needs {error.name or 'timm'}, which is not installed", hint=f"{INSTALL_TIMM}."
        ) from error
    except Exception as error:
        raise ModelError(
            f"importing timm failed ({type(error).__name__}: {error_reason(error)})",
            hint="`python -c 'import timm'` has to work; install timm again.",
        ) from error
    return timm
