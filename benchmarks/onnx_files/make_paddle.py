"""Files of Paddle's layers by paddle2onnx: `python -m benchmarks.onnx_files.make_paddle`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.onnx_files.shelf import Facts, installed, normal, open_shelf


def lenet() -> Any:
    from paddle import nn

    return nn.Sequential(
        nn.Conv2D(1, 6, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2D(2, 2),
        nn.Conv2D(6, 16, 5),
        nn.ReLU(),
        nn.MaxPool2D(2, 2),
        nn.Flatten(),
        nn.Linear(16 * 25, 32),
        nn.Linear(32, 10),
    )


def mobilenet() -> Any:
    from paddle import nn

    def conv(before: int, after: int, kernel: int, stride: int = 1, groups: int = 1) -> list[Any]:
        layer = nn.Conv2D(before, after, kernel, stride, kernel // 2, groups=groups, bias_attr=False)
        return [layer, nn.BatchNorm2D(after), nn.Hardswish()]

    body = [*conv(3, 8, 3, 2), *conv(8, 8, 3, groups=8), *conv(8, 24, 1), *conv(24, 24, 5, 2, 24), *conv(24, 32, 1)]
    return nn.Sequential(*body, nn.AdaptiveAvgPool2D(1), nn.Flatten(), nn.Linear(32, 10), nn.Softmax())


def recurrent() -> Any:
    from paddle import nn

    class Net(nn.Layer):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.cell, self.end = nn.GRU(6, 12), nn.Linear(12, 4)

        def forward(self, x: Any) -> Any:
            return self.end(self.cell(x)[0][:, -1])

    return Net()


def transformer() -> Any:
    from paddle import nn

    class Net(nn.Layer):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.body, self.end = nn.TransformerEncoderLayer(16, 2, 32, 0.0), nn.Linear(16, 4)

        def forward(self, x: Any) -> Any:
            return self.end(self.body(x).mean(1))

    return Net()


# A file per line: the net, one sample's shape, the batch (0: free) and the opset.
FILES: dict[str, tuple[Callable[[], Any], tuple[int, ...], int, int]] = {
    "lenet": (lenet, (1, 28, 28), 0, 13),
    "lenet-batch1": (lenet, (1, 28, 28), 1, 11),
    "mobilenet": (mobilenet, (3, 32, 32), 0, 14),
    "gru": (recurrent, (10, 6), 0, 13),
    "transformer": (transformer, (9, 16), 0, 16),
}


def convert(name: str, path: Path) -> tuple[Facts, dict[str, Any]]:
    import paddle

    make, shape, batch, opset = FILES[name]
    paddle.seed(0)
    net = make()
    net.eval()
    spec = [paddle.static.InputSpec([batch or None, *shape], "float32", "x")]
    paddle.onnx.export(net, str(path.with_suffix("")), input_spec=spec, opset_version=opset)
    exporter = f"paddle2onnx {installed('paddle2onnx')} of Paddle {installed('paddlepaddle')}"
    return Facts(kind=name, exporter=exporter, batch=batch), {"in.x": normal(*shape)}


if __name__ == "__main__":
    open_shelf(__doc__, "paddlepaddle", "paddle2onnx").add_all("paddle", FILES, convert)
