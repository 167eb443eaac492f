"""The tensors that a round trains, and those that it leaves frozen."""

from __future__ import annotations

from collections.abc import Collection
from fnmatch import fnmatchcase
from glob import escape

from fedprune.core.errors import ConfigError, KeyPath
from fedprune.model.architecture import Architecture, TensorKind, TensorSpec
from fedprune.model.features import Features

# In lists of patterns: the last layer's tensors, whatever their names are.
HEAD_PATTERN = "@head"


def head_axes(architecture: Architecture, setting: KeyPath = ("recipe",)) -> dict[str, int]:
    """The last layer's tensors, with the output axis of each.

    The last layer is the last one with a weight whose outputs are never cut. Its bias is, of the biases with as many
    elements as there are outputs, the one with the layer's name, or else the first one after its weight. Raises
    `ConfigError`, which names `setting`, if there is no such layer.
    """
    for layer in reversed(architecture.layers):
        spec = architecture.by_name.get(layer.weight)
        if spec is None or not spec.axes or spec.axes[layer.output_axis].groups:
            continue
        outputs = spec.axes[layer.output_axis].length
        if len(architecture.output_shape) == 1 and outputs != architecture.classes:
            continue
        axes = {spec.name: layer.output_axis}
        names = [t.name for t in architecture.tensors]
        biases = [
            t.name for t in architecture.tensors if t.kind is TensorKind.BIAS and t.shape == (outputs,)
            and not t.axes[0].groups
        ]  # fmt: skip
        prefix = spec.name.rpartition(".")[0]
        same_prefix = [b for b in biases if prefix and b.rpartition(".")[0] == prefix]
        later_biases = [b for b in biases if names.index(b) > names.index(spec.name)]
        axes.update(dict.fromkeys((same_prefix or later_biases)[:1], 0))
        return axes
    raise ConfigError(
        "the model has no last layer with weights of its own",
        path=setting,
        expected="a layer that makes all of its outputs",
        hint="Name its tensors yourself, or leave the setting out.",
    )


def expand_head(
    patterns: Collection[str], architecture: Architecture, setting: KeyPath = ("recipe",)
) -> tuple[str, ...]:
    """Patterns of tensors with the last layer's tensors in place of `@head`. Raises as `head_axes` if they are
    needed."""
    names: list[str] = []
    for pattern in patterns:
        names += [escape(n) for n in head_axes(architecture, setting)] if pattern == HEAD_PATTERN else [pattern]
    return tuple(names)


def frozen_tensors(architecture: Architecture, features: Features, frozen: Collection[str] = ()) -> frozenset[str]:
    """The names of the tensors that are not trained.

    These are the ones that the model itself froze (`requires_grad=False` in torch) or, if `features.trainable` has
    patterns, all that match none of them; and all that match a pattern of `features.frozen`. Batch-norm statistics are
    tensors, too: a frozen one isn't measured again. Raises `ConfigError` if a pattern matches no tensor, no tensor is
    left to train, or `@head` is among the patterns and the model has no last layer.
    """
    names = [t.name for t in architecture.tensors]
    frozen_names = set(frozen).intersection(names)
    if features.trainable:
        frozen_names = set(names) - matching_tensors(architecture, features.trainable, ("recipe", "trainable"))
    frozen_names |= matching_tensors(architecture, features.frozen, ("recipe", "frozen"))
    if architecture.trainable and frozen_names.issuperset(t.name for t in architecture.trainable):
        raise ConfigError(
            "every tensor is frozen",
            path=("recipe", "frozen"),
            expected="at least one that is trained",
            hint="Let recipe.frozen match less, or recipe.trainable more.",
        )
    return frozenset(frozen_names)


def trained_tensors(
    architecture: Architecture, features: Features, frozen: Collection[str] = ()
) -> tuple[TensorSpec, ...]:
    """The tensors that an optimiser changes; arguments and errors are those of `frozen_tensors`."""
    frozen_names = frozen_tensors(architecture, features, frozen)
    return tuple(t for t in architecture.trainable if t.name not in frozen_names)


def matching_tensors(architecture: Architecture, patterns: Collection[str], setting: KeyPath) -> frozenset[str]:
    """Names of the tensors that match some pattern: `*` stands for any letters, `@head` for the last layer. Raises as
    `frozen_tensors`; the message names `setting`."""
    names = [t.name for t in architecture.tensors]
    patterns = expand_head(patterns, architecture, setting)
    for pattern in patterns:
        if not any(fnmatchcase(n, pattern) for n in names):
            raise ConfigError(
                f"no tensor is called {pattern!r}",
                path=setting,
                expected="a pattern that matches some of " + ", ".join(names[:8]) + (", ..." * (len(names) > 8)),
                hint="'*' stands for any letters: 'layer1.*', '*.bias'.",
            )
    return frozenset(n for n in names if any(fnmatchcase(n, p) for p in patterns))
