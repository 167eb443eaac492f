"""A model, a state folder and the double of TensorRT, for tests of engines."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from fedprune.core import tensorfile
from fedprune.runtime.tensorrt_config import EnginePlan
from fedprune_device.engines import bindings
from fedprune_device.engines.engine_cache import EnginePlatform
from fedprune_device.engines.engine_selector import CheckedSession, EngineRequest, EngineSelector
from fedprune_device.serving.predictor import Predictor
from support.fakes.local_board import weights_of
from support.fakes.tensorrt import calls
from support.waiting import attempts

X = np.random.default_rng(3).standard_normal((9, 6)).astype(np.float32)


class EngineBoard:
    """What a test works with. `site` holds the double's settings, `root/engines` the engines."""

    def __init__(self, root: Path, site: Path, version: str, graphs: Path) -> None:
        self.root, self.site, self.version, self.graph = root, site, version, graphs / "inference.onnx"
        self.place = EnginePlatform("Orin", "36.4.3", "8.7", version, 0)
        self.engines = root / "engines"

    def set(self, **settings: Any) -> None:
        """What the double is to do from now on."""
        (self.site / "settings.json").write_text(json.dumps(settings))

    def model(self, seed: int, scale: float = 1.0) -> EngineRequest:
        """A linear model."""
        folder = self.root / f"model-{seed}-{scale}"
        folder.mkdir(exist_ok=True)
        raw = tensorfile.encode({n: v * np.float32(scale) for n, v in weights_of(seed).items()})
        (folder / "inference.onnx").write_bytes(self.graph.read_bytes())
        (folder / "weights.safetensors").write_bytes(raw)
        return EngineRequest(Predictor(folder), folder, tensorfile.sha256_hex(raw))

    def selector(self, plan: EnginePlan | None = None, **place: Any) -> EngineSelector:
        """A selector, as a process has after its start."""
        where = replace(self.place, **place)
        return EngineSelector(
            self.engines, plan or EnginePlan(batch=(1, 1, 4)), bindings.find_tensorrt, lambda _: where
        )

    def answering(
        self, selector: EngineSelector, request: EngineRequest, *, rebuild: bool = False
    ) -> CheckedSession | None:
        """What the selector comes to in the end."""
        selector.request_engine(request, rebuild=rebuild)
        for _ in attempts("a session", explain=lambda: f"{selector.status}, {selector.progress}"):
            session = selector.turn()
            if session is not None or selector.is_done:
                return session
        raise AssertionError

    def calls(self) -> list[str]:
        """What was called of TensorRT."""
        return calls(self.site)

    @property
    def builds(self) -> list[str]:
        """The builds, with flags, pools, and how much the timing cache knew."""
        return [c for c in self.calls() if c.startswith("built ")]
