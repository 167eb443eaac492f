"""Which tensors a round trains, and which stay as they are."""

from __future__ import annotations

from collections.abc import Collection
from fnmatch import fnmatchcase

from fedprune.core.errors import ConfigError
from fedprune.model.architecture import Architecture, TensorSpec
from fedprune.model.classifier_head import spelt
from fedprune.model.features import Features


def frozen_tensors(architecture: Architecture, features: Features, frozen: Collection[str] = ()) -> frozenset[str]:
    """Names of the tensors that stay as they are.

    Those are what the model itself froze (`requires_grad=False` in torch) or, where the features name what is
    trainable, everything else; and whatever matches a pattern of `features.frozen`. Batch-norm statistics are tensors,
    too: a frozen one isn't measured anew.

    Raises:
        BundleError: `@head` is among the patterns, and the model has no last layer.
        ConfigError: A pattern matches no tensor, or no tensor is left to train.
    """
    names = [t.name for t in architecture.tensors]
    out = set(frozen).intersection(names)
    if features.trainable:
        out = set(names) - matching(architecture, features.trainable, "recipe: trainable")
    out |= matching(architecture, features.frozen, "recipe: frozen")
    if architecture.trainable and out.issuperset(t.name for t in architecture.trainable):
        raise ConfigError(
            "recipe: every tensor is frozen",
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


def matching(architecture: Architecture, patterns: Collection[str], what: str) -> frozenset[str]:
    """Names of the tensors that match some pattern: `*` stands for any letters, `@head` for the last layer. Raises as
    `frozen_tensors`; the message names `what`."""
    names = [t.name for t in architecture.tensors]
    patterns = spelt(patterns, architecture)
    for pattern in patterns:
        if not any(fnmatchcase(n, pattern) for n in names):
            raise ConfigError(
                f"{what}: no tensor is called {pattern!r}",
                expected="a pattern that matches some of " + ", ".join(names[:8]) + (", ..." * (len(names) > 8)),
                hint="'*' stands for any letters: 'layer1.*', '*.bias'.",
            )
    return frozenset(n for n in names if _matches(n, patterns))


def _matches(name: str, patterns: Collection[str]) -> bool:
    return any(fnmatchcase(name, p) for p in patterns)
