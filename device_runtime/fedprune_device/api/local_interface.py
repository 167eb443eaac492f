"""Puts the local interface together: the serving model, its endpoints, and the HTTP server that answers with them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fedprune_device.api.address import LocalAddress
from fedprune_device.api.endpoints import Endpoints
from fedprune_device.api.http_server import LocalServer
from fedprune_device.api.live_model import LiveModel
from fedprune_device.data.dataset import SampleSource
from fedprune_device.data.sample_store import SampleStore
from fedprune_device.data.sources import SampleOptions
from fedprune_device.engines.engine_selector import EngineSelector
from fedprune_device.hardware.readings import temperature_c


@contextmanager
def serve_local_interface(
    address: LocalAddress | None,
    state: Path,
    options: SampleOptions,
    samples: SampleSource,
    status: Callable[[], dict[str, Any]],
    *,
    cuda: bool = False,
    selector: EngineSelector | None = None,
) -> Iterator[None]:
    """Answer the application while the body runs, if there is an address. The application may add samples if `samples`
    is a `SampleStore`. With `cuda` onnxruntime predicts on an NVIDIA GPU, if that works."""
    if address is None:
        yield
        return

    def current_status() -> dict[str, Any]:
        about = {"device": options.device, "temperature_c": temperature_c(), "samples": samples.samples}
        return {**about, **status()}

    sample_store = samples if isinstance(samples, SampleStore) else None
    with LiveModel(state / "serving", cuda=cuda, selector=selector) as model:
        endpoints = Endpoints(
            model,
            sample_store,
            current_status,
            class_names=options.class_names,
            pixels=options.pixels,
            allows_reading=address.path is not None,
        )
        with LocalServer(address, endpoints):
            yield
