"""Files of scikit-learn's estimators: `python -m benchmarks.onnx_files.make_sklearn`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.onnx_files.shelf import Facts, installed, normal, open_shelf

FEATURES = 8


def classifier(**options: Any) -> Any:
    from sklearn.neural_network import MLPClassifier

    return MLPClassifier(hidden_layer_sizes=(16,), max_iter=20, random_state=0, **options)


def logistic() -> Any:
    from sklearn.linear_model import LogisticRegression

    return LogisticRegression()


def regressor(**options: Any) -> Any:
    from sklearn.neural_network import MLPRegressor

    return MLPRegressor(hidden_layer_sizes=(16, 8), max_iter=20, random_state=0, **options)


def scaled(make: Callable[[], Any]) -> Any:
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    return make_pipeline(StandardScaler(), make())


def linear() -> Any:
    from sklearn.linear_model import LinearRegression

    return LinearRegression()


def forest() -> Any:
    from sklearn.ensemble import RandomForestClassifier

    return RandomForestClassifier(5, random_state=0)


# A file per line: the estimator, the loss, whether probabilities are a tensor, classes, and whether it is refused.
FILES: dict[str, tuple[Callable[[], Any], str, bool, int, bool]] = {
    "mlp_classifier-zipmap": (classifier, "cross_entropy", False, 3, False),
    "mlp_classifier": (classifier, "cross_entropy", True, 3, False),
    "mlp_classifier-tanh": (partial(classifier, activation="tanh"), "cross_entropy", True, 5, False),
    "mlp_classifier-binary": (classifier, "bce", True, 2, False),
    "logistic": (logistic, "cross_entropy", True, 3, True),
    "scaled_mlp_classifier": (partial(scaled, classifier), "cross_entropy", True, 3, False),
    "mlp_regressor": (regressor, "mse", True, 0, False),
    "scaled_mlp_regressor": (partial(scaled, regressor), "mse", True, 0, False),
    "linear_regression": (linear, "mse", True, 0, True),
    "random_forest": (forest, "cross_entropy", True, 3, True),
}


def convert(name: str, path: Path) -> tuple[Facts, dict[str, Any]]:
    import warnings

    from skl2onnx import to_onnx

    make, loss, tensor, classes, refused = FILES[name]
    random = np.random.default_rng(0)
    x = random.standard_normal((200, FEATURES)).astype(np.float32) * 2 + 1
    y = (x @ random.standard_normal((FEATURES, max(classes, 1)))).astype(np.float32)
    labels = y.argmax(1) if classes else y[:, 0]
    if classes == 2:
        labels = y[:, 0] > 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        estimator = make().fit(x, labels)
    options = {"zipmap": not tensor} if classes else None
    proto = to_onnx(estimator, x[:1], options=options, target_opset={"": 18, "ai.onnx.ml": 3})
    path.write_bytes(proto.SerializeToString())
    facts = Facts(kind=name, exporter=f"skl2onnx {installed('skl2onnx')}", loss=loss, refused=refused)
    return facts, {f"in.{proto.graph.input[0].name}": normal(FEATURES)}


if __name__ == "__main__":
    open_shelf(__doc__, "scikit-learn", "skl2onnx").add_all("sklearn", FILES, convert)
