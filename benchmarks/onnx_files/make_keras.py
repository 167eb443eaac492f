"""Files of Keras' models by tf2onnx: `python -m benchmarks.onnx_files.make_keras`."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from benchmarks.onnx_files.shelf import SAMPLES, Facts, installed, open_shelf

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")


def _stack(*layers: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def build(x: Any) -> Any:
        for layer in layers:
            x = layer(x)
        return x

    return build


def builds() -> dict[str, tuple[Callable[[Any], Any], tuple[int, ...], dict[str, Any]]]:
    """A file per entry: a function of the input, one sample's shape, and what is special."""
    from keras import layers as k

    def separable(x: Any) -> Any:
        y = k.SeparableConv2D(16, 3, padding="same", activation="relu")(x)
        return k.Concatenate()([x, y])

    def inverted(x: Any) -> Any:
        y = k.ReLU(6.0)(k.BatchNormalization()(k.Conv2D(24, 1, use_bias=False)(x)))
        y = k.ReLU(6.0)(k.BatchNormalization()(k.DepthwiseConv2D(3, padding="same", use_bias=False)(y)))
        return k.Add()([x, k.BatchNormalization()(k.Conv2D(8, 1, use_bias=False)(y))])

    def down(x: Any) -> Any:
        fine = k.Conv2D(8, 3, padding="same", activation="relu")(x)
        y = k.Conv2D(16, 3, padding="same", activation="relu")(k.MaxPooling2D()(fine))
        y = k.Concatenate()([k.Conv2DTranspose(8, 2, strides=2)(y), fine])
        return k.Conv2D(3, 1)(y)

    def attention(x: Any) -> Any:
        y = k.LayerNormalization()(x + k.MultiHeadAttention(2, 8)(x, x))
        return k.Dense(5)(k.GlobalAveragePooling1D()(y + k.Dense(6)(k.Dense(16, activation="relu")(y))))

    cnn = _stack(
        k.Conv2D(8, 3, activation="relu"),
        k.MaxPooling2D(),
        k.Conv2D(16, 3, activation="relu"),
        k.MaxPooling2D(),
        k.Flatten(),
        k.Dropout(0.3),
        k.Dense(16, activation="relu"),
        k.Dense(10),
    )
    stem = k.Conv2D(8, 3, strides=2, padding="same", use_bias=False)
    mobile = _stack(stem, k.BatchNormalization(), k.ReLU(6.0), inverted, k.GlobalAveragePooling2D(), k.Dense(10))
    picture, steps = (24, 24, 3), (10, 6)
    return {
        "dense": (_stack(k.Dense(32, activation="relu"), k.Dense(4)), (12,), {}),
        "dense-softmax": (_stack(k.Dense(32, activation="relu"), k.Dense(4, activation="softmax")), (12,), {}),
        "dense-batch1": (_stack(k.Dense(32, activation="tanh"), k.Dense(1)), (12,), {"batch": 1, "loss": "mse"}),
        "cnn": (cnn, picture, {}),
        "cnn-batch1": (cnn, picture, {"batch": 1}),
        "cnn-nchw": (cnn, picture, {"nchw": True}),
        "cnn-uint8": (_stack(k.Rescaling(1 / 127.5, offset=-1), cnn), picture, {"dtype": "uint8"}),
        "mobilenet": (mobile, picture, {}),
        "mobilenet-13": (mobile, picture, {"opset": 13, "batch": 1}),
        "separable": (_stack(k.Conv2D(8, 3), separable, k.GlobalMaxPooling2D(), k.Dense(10)), picture, {}),
        "unet": (down, (16, 16, 3), {"loss": "mse"}),
        "lstm": (_stack(k.LSTM(12), k.Dense(4)), steps, {}),
        "lstm-steps": (_stack(k.LSTM(12, return_sequences=True), k.LSTM(8), k.Dense(4)), steps, {}),
        "lstm-both": (_stack(k.Bidirectional(k.LSTM(8)), k.Dense(4)), steps, {"batch": 1}),
        "gru": (_stack(k.GRU(12), k.Dense(4)), steps, {}),
        "gru-old": (_stack(k.GRU(12, reset_after=False), k.Dense(4)), steps, {}),
        "conv1d": (
            _stack(k.Conv1D(16, 3, padding="causal", activation="relu"), k.GlobalMaxPooling1D(), k.Dense(4)),
            steps,
            {},
        ),
        "attention": (attention, steps, {}),
        "embedding": (_stack(k.Embedding(50, 16), k.GlobalAveragePooling1D(), k.Dense(3)), (12,), {"dtype": "int32"}),
        "upsampled": (
            _stack(
                k.Conv2D(8, 3, strides=2, padding="same"), k.UpSampling2D(2, interpolation="bilinear"), k.Conv2D(2, 1)
            ),
            (16, 16, 3),
            {"loss": "mse"},
        ),
    }


def convert(name: str, path: Path) -> tuple[Facts, dict[str, Any]]:
    import keras
    import tensorflow as tf
    import tf2onnx

    build, shape, special = builds()[name]
    keras.utils.set_random_seed(0)
    dtype, batch = special.get("dtype", "float32"), special.get("batch", 0)
    inputs = keras.Input(shape, dtype=dtype)
    # As people feed bytes: the model casts them.
    x = keras.ops.cast(inputs, "float32") if dtype == "uint8" else inputs
    model = keras.Model(inputs, build(x))
    random = np.random.default_rng(1)
    model.set_weights([np.abs(w) + 0.1 * random.random(w.shape) if w.ndim == 1 else w for w in model.get_weights()])
    signature = [tf.TensorSpec([batch or None, *shape], dtype, "x")]
    nchw = {"inputs_as_nchw": ["x"]} if special.get("nchw") else {}
    function = tf.function(lambda x: model(x, training=False), input_signature=signature)
    proto, _ = tf2onnx.convert.from_function(function, signature, opset=special.get("opset", 17), **nchw)
    onnx.save(proto, path)
    random = np.random.default_rng(5)
    if dtype == "float32":
        samples = random.standard_normal((SAMPLES, *shape)).astype(np.float32)
    else:
        samples = random.integers(0, 50, (SAMPLES, *shape)).astype(dtype)
    if nchw:
        samples = np.ascontiguousarray(samples.transpose(0, 3, 1, 2))
    exporter = f"tf2onnx {installed('tf2onnx')} of Keras {keras.__version__}"
    loss = special.get("loss", "cross_entropy")
    return Facts(kind=name, exporter=exporter, loss=loss, batch=batch), {f"in.{proto.graph.input[0].name}": samples}


if __name__ == "__main__":
    open_shelf(__doc__, "keras", "tf2onnx").add_all("keras", builds(), convert)
