"""A model of two groups of channels, of which each tensor holds one or both."""

from fedprune.model.architecture import (
    Activation,
    Architecture,
    Axis,
    ChannelGroup,
    LayerRow,
    Segment,
    TensorKind,
    TensorSpec,
)

FIRST, SECOND = Axis((Segment(0, 0, 6),)), Axis((Segment(1, 0, 5),))
ARCHITECTURE = Architecture(
    "two groups",
    (ChannelGroup("g0", 6), ChannelGroup("g1", 5)),
    (
        TensorSpec("a", TensorKind.WEIGHT, (FIRST, Axis.fixed(4))),
        TensorSpec("a.mean", TensorKind.STAT_MEAN, (FIRST,)),
        TensorSpec("a.var", TensorKind.STAT_VAR, (FIRST,)),
        TensorSpec("b", TensorKind.WEIGHT, (SECOND, FIRST)),
        TensorSpec("head", TensorKind.WEIGHT, (Axis.fixed(3), SECOND)),
    ),
    (LayerRow("a", "Gemm", "a", 1), LayerRow("b", "Gemm", "b", 1), LayerRow("head", "Gemm", "head", 1)),
    (Activation("h", FIRST, 1, True), Activation("i", SECOND, 1, True)),
    (4,),
    (3,),
)
TRAINED = frozenset(t.name for t in ARCHITECTURE.trainable)
