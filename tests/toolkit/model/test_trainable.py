"""Which tensors a round trains."""

import pytest

from fedprune.core.errors import ConfigError
from fedprune.model.architecture import Architecture, Axis, TensorKind, TensorSpec
from fedprune.model.features import Features
from fedprune.model.trainable import frozen_tensors, trained_tensors
from support.nets.written_nets import written_net

pytestmark = pytest.mark.board

KINDS = {
    "conv.weight": TensorKind.WEIGHT,
    "norm.weight": TensorKind.NORM_SCALE,
    "norm.bias": TensorKind.NORM_BIAS,
    "norm.running_mean": TensorKind.STAT_MEAN,
    "norm.running_var": TensorKind.STAT_VAR,
    "fc.weight": TensorKind.WEIGHT,
    "fc.bias": TensorKind.BIAS,
}
MODEL = Architecture("m", (), tuple(TensorSpec(n, k, (Axis.fixed(2),)) for n, k in KINDS.items()), (), (), (2,), (2,))
STATISTICS = {"norm.running_mean", "norm.running_var"}


@pytest.mark.parametrize(
    ("features", "model", "trained", "statistics"),
    [
        (Features(), (), set(KINDS) - STATISTICS, STATISTICS),
        (Features(), ("fc.bias", "gone"), set(KINDS) - STATISTICS - {"fc.bias"}, STATISTICS),
        (Features(frozen=("norm.*",)), (), {"conv.weight", "fc.weight", "fc.bias"}, set()),
        (Features(frozen=("norm.weight", "conv.*")), ("fc.bias",), {"norm.bias", "fc.weight"}, STATISTICS),
        (Features(trainable=("*.bias",)), (), {"norm.bias", "fc.bias"}, set()),
        (Features(trainable=("fc.*", "norm.running_*")), ("fc.bias",), {"fc.weight", "fc.bias"}, STATISTICS),
        (Features(trainable=("fc.*",), frozen=("*.bias",)), (), {"fc.weight"}, set()),
    ],
)
def test_patterns_say_what_is_trained(
    features: Features, model: tuple[str, ...], trained: set[str], statistics: set[str]
) -> None:
    assert {t.name for t in trained_tensors(MODEL, features, model)} == trained
    assert frozen_tensors(MODEL, features, model) == set(KINDS) - trained - statistics


HEADED = written_net(
    {},
    {"conv.weight": (4, 2), "fc.weight": (2, 4), "fc.bias": (2,)},
    (2,),
    (2,),
    kinds={"fc.bias": TensorKind.BIAS},
)


@pytest.mark.parametrize(
    ("features", "trained"),
    [
        (Features(frozen=("@head",)), {"conv.weight"}),
        (Features(trainable=("@head",)), {"fc.weight", "fc.bias"}),
        (Features(trainable=("@head", "conv.*"), frozen=("*.bias",)), {"conv.weight", "fc.weight"}),
    ],
)
def test_the_last_layer_can_be_named_by_what_it_is(features: Features, trained: set[str]) -> None:
    assert {t.name for t in trained_tensors(HEADED, features)} == trained


@pytest.mark.parametrize("option", ["frozen", "trainable"])
def test_a_pattern_that_matches_nothing_is_refused(option: str) -> None:
    features = Features(frozen=("fc.*", "layer9.*")) if option == "frozen" else Features(trainable=("layer9.*",))
    with pytest.raises(ConfigError, match=rf"recipe.{option}: no tensor is called 'layer9\.\*'.*conv\.weight"):
        frozen_tensors(MODEL, features)


@pytest.mark.parametrize(
    ("features", "model"),
    [
        (Features(frozen=("*",)), ()),
        (Features(trainable=("norm.running_*",)), ()),
        (Features(frozen=("fc.*",)), ("conv.weight", "norm.weight", "norm.bias")),
    ],
)
def test_freezing_everything_is_refused(features: Features, model: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match="every tensor is frozen"):
        frozen_tensors(MODEL, features, model)
