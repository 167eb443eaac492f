"""The local interface and the sample source that the command line configures."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from fedprune_device.api.address import LOCAL, SOCKET, Address
from fedprune_device.api.endpoints import Endpoints
from fedprune_device.api.http_server import LocalServer
from fedprune_device.api.live_model import LiveModel
from fedprune_device.data.dataset import SampleSource, load_data
from fedprune_device.data.image_decoding import Pixels
from fedprune_device.data.image_folder import ImageFolder
from fedprune_device.data.reservoir import Limits
from fedprune_device.data.sample_store import SampleStore
from fedprune_device.data.splits import SplitShares
from fedprune_device.engines.engine_selector import EngineSelector
from fedprune_device.hardware.readings import temperature_c

_LARGEST_ROOM = 2**40


def local_address(arguments: argparse.Namespace) -> Address | None:
    """Where to listen; None where the application isn't answered."""
    if arguments.local is None:
        return None
    return Address.parse(arguments.local or f"unix:{arguments.state.absolute() / SOCKET}")


def open_samples(arguments: argparse.Namespace, stack: ExitStack) -> SampleSource:
    if arguments.data == LOCAL:
        limits = Limits(arguments.samples_most, min(arguments.samples_bytes, _LARGEST_ROOM))
        return stack.enter_context(SampleStore(arguments.state / "samples", limits, _shares(arguments)))
    return fixed_samples(arguments, spool=arguments.state)


def fixed_samples(
    arguments: argparse.Namespace, class_names: tuple[str, ...] = (), spool: Path | None = None
) -> SampleSource:
    """The samples of a file, a function or a folder of images. `spool` is a folder for copies of large arrays
    (`load_data`).
    """
    source, names = arguments.data, arguments.class_names or class_names
    if Path(source).is_dir():
        return ImageFolder(Path(source), _pixels(arguments), _shares(arguments), arguments.samples_most, names, spool)
    return load_data(source, arguments.seed, arguments.device, arguments.validation_share, spool=spool)


def _shares(arguments: argparse.Namespace) -> SplitShares:
    return SplitShares(arguments.test_share, arguments.validation_share, arguments.seed, arguments.device)


@contextmanager
def answering(
    address: Address | None,
    arguments: argparse.Namespace,
    samples: SampleSource,
    status: Callable[[], dict[str, Any]],
    *,
    cuda: bool = False,
    selector: EngineSelector | None = None,
) -> Iterator[None]:
    """Answer the application while the body runs, if there is an address.

    The application may add samples if `samples` is a `SampleStore`. With `cuda` onnxruntime predicts on an NVIDIA GPU,
    if that works.
    """
    if address is None:
        yield
        return

    def standing() -> dict[str, Any]:
        about = {"device": arguments.device, "temperature_c": temperature_c(), "samples": samples.samples}
        return {**about, **status()}

    takes, names = samples if isinstance(samples, SampleStore) else None, arguments.class_names
    with LiveModel(arguments.state / "serving", cuda=cuda, selector=selector) as model:
        endpoints = Endpoints(model, takes, standing, class_names=names, pixels=_pixels(arguments))
        with LocalServer(address, endpoints):
            yield


def _pixels(arguments: argparse.Namespace) -> Pixels:
    return Pixels(arguments.image_mean, arguments.image_deviation)
