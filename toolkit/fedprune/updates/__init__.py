"""Updates on their way: codecs (differences, quantisation, sparse indices, packing) and the noise that privacy adds.

Not here: messages and chunks (`wire`), and a board owner's own privacy rules (`fedprune_device.privacy`).
"""

from fedprune.updates import weights
from fedprune.updates.codecs import AUTO, CODECS, DOWN, NO_CODECS, PLAIN, WHOLE, Codec, Codecs, agreed
from fedprune.updates.packing import is_packed
from fedprune.updates.update import bound, decode, encode

__all__ = [
    "AUTO",
    "CODECS",
    "DOWN",
    "NO_CODECS",
    "PLAIN",
    "WHOLE",
    "Codec",
    "Codecs",
    "agreed",
    "bound",
    "decode",
    "encode",
    "is_packed",
    "weights",
]
