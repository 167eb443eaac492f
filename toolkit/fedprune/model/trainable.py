"""Which tensors a round trains, and which stay as they are."""

from __future__ import annotations

from collections.abc import Collection
from fnmatch import fnmatchcase
from glob import escape

from fedprune.core.errors import ConfigError, KeyPath
from fedprune.model.architecture import Architecture, TensorKind, TensorSpec
from fedprune.model.recipe import Features

# A pattern that stands for the last layer's tensors, where tensors are named by patterns.
HEAD = "@head"


def head_axes(architecture: Architecture, setting: KeyPath = ("recipe",)) -> dict[str, int]:
    """The last layer's tensors, with the axis of each along which the outputs are.

    That is the last layer with a weight whose outputs no cut may touch, and its bias: of all biases as long as there
    are outputs the one that is called like the layer, or else the first behind its weight. Raises `ConfigError` if
    there is none; the message names `setting` needs it.
    """
    for layer in reversed(architecture.layers):
        spec = architecture.by_name.get(layer.weight)
        if spec is None or not spec.axes or spec.axes[layer.output_axis].groups:
            continue
        outputs = spec.axes[layer.output_axis].length
        if len(architecture.output_shape) == 1 and outputs != architecture.classes:
            continue
        out = {spec.name: layer.output_axis}
        names = [t.name for t in architecture.tensors]
        biases = [
            t.name for t in architecture.tensors if t.kind is TensorKind.BIAS and t.shape == (outputs,)
            and not t.axes[0].groups
        ]  # fmt: skip
        prefix = spec.name.rpartition(".")[0]
        named = [b for b in biases if prefix and b.rpartition(".")[0] == prefix]
        behind = [b for b in biases if names.index(b) > names.index(spec.name)]
        out.update(dict.fromkeys((named or behind)[:1], 0))
        return out
    raise ConfigError(
        "the model has no last layer with weights of its own",
        path=setting,
        expected="a layer that makes all of its outputs",
        hint="Name its tensors yourself, or leave the setting out.",
    )


def spelt(patterns: Collection[str], architecture: Architecture, setting: KeyPath = ("recipe",)) -> tuple[str, ...]:
    """Patterns of tensors with `@head` spelt out. Raises as `head_axes` if it is among them."""
    out: list[str] = []
    for pattern in patterns:
        out += [escape(n) for n in head_axes(architecture, setting)] if pattern == HEAD else [pattern]
    return tuple(out)


def frozen_tensors(architecture: Architecture, features: Features, frozen: Collection[str] = ()) -> frozenset[str]:
    """Names of the tensors that stay as they are.

    Those are what the model itself froze (`requires_grad=False` in torch) or, where the features name what is
    trainable, everything else; and whatever matches a pattern of `features.frozen`. Batch-norm statistics are tensors,
    too: a frozen one isn't measured again. Raises `ConfigError` if a pattern matches no tensor, no tensor is left to
    train, or `@head` is among the patterns and the model has no last layer.
    """
    names = [t.name for t in architecture.tensors]
    out = set(frozen).intersection(names)
    if features.trainable:
        out = set(names) - matching(architecture, features.trainable, ("recipe", "trainable"))
    out |= matching(architecture, features.frozen, ("recipe", "frozen"))
    if architecture.trainable and out.issuperset(t.name for t in architecture.trainable):
        raise ConfigError(
            "every tensor is frozen",
            path=("recipe", "frozen"),
            expected="at least one that is trained",
            hint="Let recipe.frozen match less, or recipe.trainable more.",
        )
    return frozenset(out)


def trained_tensors(
    architecture: Architecture, features: Features, frozen: Collection[str] = ()
) -> tuple[TensorSpec, ...]:
    """The tensors that an optimiser moves; arguments and errors are those of `frozen_tensors`."""
    still = frozen_tensors(architecture, features, frozen)
    return tuple(t for t in architecture.trainable if t.name not in still)


def matching(architecture: Architecture, patterns: Collection[str], setting: KeyPath) -> frozenset[str]:
    """Names of the tensors that match some pattern: `*` stands for any letters, `@head` for the last layer. Raises as
    `frozen_tensors`; the message names `setting`."""
    names = [t.name for t in architecture.tensors]
    patterns = spelt(patterns, architecture, setting)
    for pattern in patterns:
        if not any(fnmatchcase(n, pattern) for n in names):
            raise ConfigError(
                f"no tensor is called {pattern!r}",
                path=setting,
                expected="a pattern that matches some of " + ", ".join(names[:8]) + (", ..." * (len(names) > 8)),
                hint="'*' stands for any letters: 'layer1.*', '*.bias'.",
            )
    return frozenset(n for n in names if any(fnmatchcase(n, p) for p in patterns))
